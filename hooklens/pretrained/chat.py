"""Chat templates: small Jinja programs that come with instruct models. They run in a sandbox."""

import json
import re
from collections.abc import Collection, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from hooklens.core.errors import InputError, WrongType, did_you_mean

_EXAMPLE = "{'role': 'user', 'content': 'Hello'}"


def render(
    template: str,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    tokens: Mapping[str, str] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation with a chat template; `variables` are the template's inputs besides the messages.

    >>> template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\\n{% endfor %}"
    >>> render(template, [{"role": "user", "content": "Hi"}], add_generation_prompt=False)
    '[user] Hi\\n'
    """
    from jinja2 import TemplateError

    _check(messages)
    arguments = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    _check_variables(template, variables or {}, arguments)
    named = {"tools": None, "documents": None, **(tokens or {}), **(variables or {}), **arguments}
    try:
        return _compiled(template).render(named)
    except TemplateError as error:
        raise InputError(
            f"the model's chat template rejects this conversation: {error}; roles given: "
            f"{', '.join(message['role'] for message in messages)}"
        ) from error


def _check(messages: list[dict[str, Any]]) -> None:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise WrongType(f"messages must be a list of dicts like {_EXAMPLE}, got {messages!r:.80}")
    if not messages:
        raise InputError(f"messages is empty; give at least one message, like {_EXAMPLE}")
    for i, message in enumerate(messages):
        if "role" not in message or "content" not in message:
            raise InputError(f"message {i} is {message!r:.80}; a message looks like {_EXAMPLE}")


def _check_variables(template: str, given: Mapping[str, Any], arguments: Collection[str]) -> None:
    """Refuse variables that the template does not read: they would have no effect, silently."""
    from jinja2 import meta

    environment = _compiled(template).environment
    read = meta.find_undeclared_variables(environment.parse(_plain(template)))
    known = sorted(read - set(arguments) - set(environment.globals))
    for name in given:
        if name in arguments:
            raise InputError(f"{name} is a separate argument; leave it out of variables")
        if name not in known:
            raise did_you_mean("variable of this chat template", name, known)


def _plain(template: str) -> str:
    """The template without transformers' tag around the assistant's words, which has no effect on the text."""
    plain = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", plain)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)  # Jinja's own version escapes for HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(_plain(template))
    except TemplateSyntaxError as error:
        raise InputError(f"the model's chat template is not valid Jinja, line {error.lineno}: {error}") from error
