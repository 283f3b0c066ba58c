"""Chat templates: the same text as transformers', in a sandbox, with errors in words."""

import re
from dataclasses import replace
from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from hooklens.core.errors import InputError, NameNotFound
from hooklens.pretrained.chat import render
from hooklens.pretrained.tokenizer import tiny_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>you</b> é\n"},
    {"role": "assistant", "content": " Hello! "},
    {"role": "user", "content": "Why?"},
]
TEMPLATES = [
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{ bos_token }}\n{% for m in messages if m.role != 'system' %}\n    {% if loop.first %}\n"
    "[{{ m.content | trim }}]\n    {% else %}\n{{ m | tojson }}\n    {% endif %}\n{% endfor %}",
    "{%- for m in messages %}{%- if m.role == 'system' %}{%- continue %}{%- endif %}{{ m.content }}{%- endfor %}",
    "{%- for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}x{%- generation -%} y "
    "{%- endgeneration -%} z{%- endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endfor %}"
    "{{ tools is none }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_equal_to_transformers(template, prompt):
    expected, _ = render_jinja_template(
        [TALK], chat_template=template, add_generation_prompt=prompt, tools=None, documents=None, bos_token="<s>"
    )
    assert render(template, TALK, add_generation_prompt=prompt, tokens={"bos_token": "<s>"}) == expected[0]


def test_the_date_is_todays():
    assert render("{{ strftime_now('%Y') }}", TALK, add_generation_prompt=False) == str(datetime.now().year)


@pytest.mark.parametrize(
    ("template", "messages", "why"),
    [
        ("{{ raise_exception('no system') }}", TALK, "rejects this conversation: no system; roles given: system, user"),
        ("{% for %}", TALK, "not valid Jinja, line 1"),
        ("{{ ''.__class__.__mro__ }}", TALK, "rejects this conversation: access to attribute"),
        ("x", [], "messages is empty; give at least one message, like {'role'"),
        ("x", [{"role": "user"}], "message 0 is {'role': 'user'}"),
    ],
)
def test_refusals(template, messages, why):
    with pytest.raises(InputError, match=re.escape(why)):
        render(template, messages, add_generation_prompt=True)


@pytest.mark.parametrize("messages", ["Hello", ["Hello"]])
def test_messages_of_another_kind(messages):
    with pytest.raises(TypeError, match=r"messages must be a list of dicts like|Type-check error"):
        render("x", messages, add_generation_prompt=True)


THINKING = "{% set n = 1 %}{{ messages[0].content }}{% if enable_thinking is false %}!{% endif %}"


def test_a_template_is_given_the_variables_that_it_reads_and_no_others():
    tokenizer = replace(tiny_tokenizer("", extra=("<s>",)), chat_template=THINKING + "{{ tools or '' }}{{ bos_token }}")
    assert tokenizer.apply_chat_template(TALK[:1], variables={"enable_thinking": True}) == TALK[0]["content"] + "<s>"
    assert tokenizer.apply_chat_template(TALK[:1], variables={"enable_thinking": False}) == TALK[0]["content"] + "!<s>"
    assert tokenizer.apply_chat_template(TALK[:1], variables={"tools": "T"}) == TALK[0]["content"] + "T<s>"
    with pytest.raises(NameNotFound, match="'enable_thinkin'; closest: enable_thinking"):
        tokenizer.apply_chat_template(TALK[:1], variables={"enable_thinkin": False})
    with pytest.raises(InputError, match="messages is a separate argument"):
        tokenizer.apply_chat_template(TALK[:1], variables={"messages": []})
