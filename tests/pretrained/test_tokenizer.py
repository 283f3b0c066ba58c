"""Tokens and strings: nothing is lost, nothing is added, and every refusal says what would work."""

import copy
import errno
import json
import os
import pickle
import stat

import pytest
import tokenizers
import torch
from close import close
from gguf_metadata import byte_level, sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_strings import odd_strings
from tokenizers import decoders, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import hooklens as hl
from hooklens.core.errors import FileRefused, InputError, Unavailable, WrongType
from hooklens.pretrained.tokenizer import Tokenizer, byte_values, tiny_tokenizer
from hooklens.testing import tiny_model

TINY = tiny_tokenizer("the he Mary", extra=("<bos>", "<eos>"))
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT)
@settings(max_examples=60, deadline=None)
def test_what_goes_in_comes_out(text):
    assert TINY.to_string(TINY.encode(text)) == text
    if text:
        assert TINY.to_string(TINY.to_tokens(text)) == [text]
        assert TINY.to_string(TINY.to_tokens(text)[0]) == text


@given(TEXT)
@settings(max_examples=30, deadline=None)
def test_ascii_str_tokens_join_to_the_text(text):
    text = text.encode("ascii", "ignore").decode()
    if text:
        assert "".join(TINY.to_str_tokens(text)) == text


@given(st.lists(TEXT.filter(bool), min_size=1, max_size=4), st.sampled_from(["left", "right"]))
@settings(max_examples=50, deadline=None)
def test_a_batch_is_its_rows_padded(texts, side):
    tokens, mask = TINY.to_tokens(texts, padding_side=side, return_mask=True)
    for row, kept, text in zip(tokens, mask, texts, strict=True):
        assert row[kept].tolist() == TINY.encode(text)
        assert kept.tolist() == sorted(kept.tolist(), reverse=side == "right")
        assert set(row[~kept].tolist()) <= {0}


def test_padding_uses_pad_then_eos_then_zero():
    for tokenizer, pad in [
        (Tokenizer(TINY.backend, pad_id=5, eos_id=6), 5),
        (Tokenizer(TINY.backend, eos_id=6), 6),
        (Tokenizer(TINY.backend), 0),
        (Tokenizer(TINY.backend, pad_id=0, eos_id=6), 0),
    ]:
        assert tokenizer.to_tokens(["the", "x"])[1].tolist()[-1:] == [pad] or len(TINY.encode("the")) == 1
        assert tokenizer.to_tokens(["xy", "x"])[1, 1] == pad


def test_bos_is_added_only_as_asked():
    bos = TINY.bos_id
    trained = Tokenizer(TINY.backend, bos_id=bos, default_prepend_bos=True)
    assert TINY.to_tokens("x").tolist() == [TINY.encode("x")]
    assert TINY.to_tokens("x", prepend_bos=True).tolist() == [[bos, *TINY.encode("x")]]
    assert trained.to_tokens("x").tolist() == [[bos, *TINY.encode("x")]]
    assert trained.to_tokens("x", prepend_bos=False).tolist() == [TINY.encode("x")]
    assert trained.to_tokens("<bos>x").tolist() == [[bos, *TINY.encode("x")]], "one that is written is not doubled"
    assert trained.to_tokens("<bos>x", prepend_bos=True).tolist() == [[bos, bos, *TINY.encode("x")]]
    assert trained.to_tokens("").tolist() == [[bos]]


def test_str_tokens_of_ids_of_text_and_of_a_batch_of_one():
    ids = TINY.to_tokens("the é<eos>", prepend_bos=True)
    expected = ["<bos>", "the", " ", "�", "�", "<eos>"]
    assert TINY.to_str_tokens("the é<eos>", prepend_bos=True) == expected
    assert TINY.to_str_tokens(ids) == TINY.to_str_tokens(ids[0]) == TINY.to_str_tokens(ids[0].tolist()) == expected
    with pytest.raises(InputError, match="got a batch of 2"):
        TINY.to_str_tokens(ids.repeat(2, 1))


def test_to_string_takes_what_tokens_come_as():
    ids = TINY.encode("the he")
    assert TINY.to_string(ids) == TINY.to_string(torch.tensor(ids)) == "the he"
    assert TINY.to_string([ids, ids]) == TINY.to_string(torch.tensor([ids, ids])) == ["the he", "the he"]
    assert TINY.to_string(torch.tensor(ids[0])) == TINY.to_string(ids[0]) == "the"
    assert TINY.to_string([]) == ""


def test_sentencepiece_str_tokens_keep_their_spaces():
    tokenizer = Tokenizer.from_gguf(sentencepiece())
    pieces = tokenizer.to_str_tokens("a the 𝔘", prepend_bos=False)
    assert "".join(pieces).startswith(" a the ") and pieces[-4:] == ["�"] * 4
    assert tokenizer.to_string(tokenizer.encode("a the 𝔘")) == "a the 𝔘"


@pytest.mark.parametrize("pad", [-1, 99_999])
def test_a_pad_id_outside_the_vocabulary_does_not_block_a_batch(tmp_path, pad):
    tokenizer = Tokenizer(TINY.backend, pad_id=pad, eos_id=6)
    tokens, mask = tokenizer.to_tokens(["x y", "x"], return_mask=True)
    assert tokens[~mask].unique().tolist() == [6] and tokenizer.to_string(tokens)
    TINY.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": -1}))
    assert Tokenizer.from_folder(tmp_path).pad_id is None


@pytest.mark.parametrize(("eos", "pad"), [(6, 6), (None, 0)])
def test_a_pad_token_without_a_row_of_the_model_does_not_block_a_batch_of_texts(eos, pad):
    """A token added for padding, beyond the rows of the embedding."""
    last = TINY.vocab_size - 1
    model = tiny_model(d_vocab=last)
    model.tokenizer = Tokenizer(TINY.backend, pad_id=last, eos_id=eos)
    tokens, mask = model.to_tokens(["x y", "x"], return_mask=True)
    assert tokens[~mask].unique().tolist() == [pad]
    together = model(["x y", "x"])
    assert close(together[1, :1], model("x")[0])
    assert torch.allclose(together, model(tokens, attention_mask=mask))


def test_single_tokens():
    assert TINY.to_single_token("the") == TINY.encode("the")[0]
    assert TINY.to_single_token("<eos>") == TINY.backend.token_to_id("<eos>")
    with pytest.raises(InputError, match=r"'Mary!' is 2 tokens \['Mary', '!'\], one is needed; use 'Mary', its first"):
        TINY.to_single_token("Mary!")
    with pytest.raises(InputError, match="'' has no tokens"):
        TINY.to_single_token("")


def spaced(kind):
    """Tokenizers that put a space of their own in front of a text: Llama's old and new way, a byte-level one's."""
    space = "Ġ" if kind == "byte level" else "▁"
    pieces = ["<unk>", *sorted(byte_values()), "▁", "Mary", *(space + word for word in ("s", "Mary", "Anna"))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>", ignore_merges=True))
    if kind == "byte level":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
    elif kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace()
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return Tokenizer(backend, unk_id=0)


@pytest.mark.parametrize("kind", ["metaspace", "prepended", "byte level"])
def test_a_word_with_and_without_its_space_are_two_tokens_where_the_tokenizer_adds_a_space_itself(kind):
    """`logit_diff("s", " s")` was 0 for Llama 2, Mistral and Phi-3: both were the token of " s"."""
    tokenizer = spaced(kind)
    for word in ("s", "Mary"):
        assert tokenizer.to_str_tokens([tokenizer.to_single_token(word)]) == [word]
        assert tokenizer.to_str_tokens([tokenizer.to_single_token(f" {word}")]) == [f" {word}"]
    assert tokenizer.find_token("Anna") is None and tokenizer.find_token(" Anna") is not None
    with pytest.raises(InputError, match="the vocabulary has no token 'Anna' and reads it as ' Anna'; use that"):
        tokenizer.to_single_token("Anna")
    model = tiny_model(d_vocab=tokenizer.vocab_size)
    model.tokenizer = tokenizer
    metric = hl.logit_diff(model, answer="s", wrong_answer=" s")
    assert float(metric(torch.arange(tokenizer.vocab_size).float()[None, None])) != 0


def test_a_word_that_is_unknown_is_no_single_token():
    words = tokenizers.models.WordLevel({"<unk>": 0, "Mary": 1}, unk_token="<unk>")
    tokenizer = Tokenizer(tokenizers.Tokenizer(words), unk_id=0)
    assert tokenizer.to_single_token("Mary") == 1 and tokenizer.find_token("Anna") is None
    with pytest.raises(InputError, match="the vocabulary has no token 'Anna' and reads it as '<unk>'"):
        tokenizer.to_single_token("Anna")


def test_a_vocabulary_of_characters_is_read_back(tmp_path):
    characters = tokenizers.models.WordLevel({"a": 0, "b": 1, "\n": 2}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(characters)
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    Tokenizer(backend).save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).encode("ab\na") == [0, 1, 2, 0]


def test_single_tokens_of_sentencepiece_with_a_leading_space():
    """Its own space in front makes two tokens of ' a'; the vocabulary's '▁a' is what is meant."""
    metadata = sentencepiece()
    metadata["tokenizer.ggml.tokens"] += ["▁Mary"]
    metadata["tokenizer.ggml.scores"] += [0.0]
    metadata["tokenizer.ggml.token_type"] += [1]
    assert Tokenizer.from_gguf(metadata).to_single_token(" Mary") == len(metadata["tokenizer.ggml.tokens"]) - 1


def test_refusals():
    with pytest.raises(InputError, match=r"the prompt '' \(number 1\) is empty"):
        TINY.to_tokens(["x", ""])
    with pytest.raises(InputError, match="got an empty list"):
        TINY.to_tokens([])
    with pytest.raises(InputError, match="has no BOS token"):
        Tokenizer(TINY.backend).to_tokens("x", prepend_bos=True)
    with pytest.raises(
        (InputError, TypeError), match=r"padding_side must be 'left' or 'right', got 'top'|Type-check error"
    ):
        TINY.to_tokens("x", padding_side="top")
    with pytest.raises(TypeError, match=r"got int|Type-check error"):
        TINY.to_tokens(["x", 3])
    with pytest.raises(InputError, match="half of a surrogate pair"):
        TINY.to_tokens("a\ud800b")
    with pytest.raises(InputError, match=f"-1 is not a token id; this tokenizer's ids are 0 to {TINY.vocab_size - 1}"):
        TINY.to_str_tokens([-1])


def test_tokens_that_only_the_model_knows_ended_a_generation_with_an_error():
    """Vocabularies of models are padded: transformers leaves such tokens out of the text, here they are seen."""
    assert TINY.to_str_tokens([TINY.encode("a")[0], 99999]) == ["a", "<99999>"]
    assert TINY.to_string([*TINY.encode("a b"), 99999, *TINY.encode("c")]) == "a b<99999>c"
    model = tiny_model(d_vocab=600)
    model.tokenizer = TINY
    largest = torch.nn.functional.one_hot(torch.tensor(599), 600).float()
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda act, hook: largest.expand_as(act).clone())]):
        assert model.generate("ab", 2).texts == ["<599><599>"]


def test_copies_and_pickles():
    assert copy.deepcopy(TINY) is TINY
    again = pickle.loads(pickle.dumps(TINY))
    assert again.encode("the 🙂 <eos>") == TINY.encode("the 🙂 <eos>") and again.bos_id == TINY.bos_id


def test_special_ids():
    assert TINY.special_ids == {TINY.backend.token_to_id("<bos>"), TINY.backend.token_to_id("<eos>")}
    assert Tokenizer(TINY.backend, eos_id=7).special_ids == TINY.special_ids | {7}


def test_save_and_read_back(tmp_path):
    one = Tokenizer.from_gguf(
        byte_level("smollm", **{"tokenizer.chat_template": "{{ bos_token }}", "tokenizer.ggml.eot_token_id": 4})
    )
    one.save(tmp_path / "new")
    two = Tokenizer.from_folder(tmp_path / "new")
    for name in (
        "bos_id",
        "eos_id",
        "pad_id",
        "unk_id",
        "default_prepend_bos",
        "chat_template",
        "stop_ids",
        "vocab_size",
    ):
        assert getattr(one, name) == getattr(two, name), name
    assert [one.encode(text) for text in odd_strings()] == [two.encode(text) for text in odd_strings()]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert (
        theirs.encode("the 12", add_special_tokens=False) == one.encode("the 12") and theirs.bos_token_id == one.bos_id
    )


def fast(**options) -> PreTrainedTokenizerFast:
    backend = copy.deepcopy(TINY.backend)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", **options)


def with_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Llama 3's way: BOS comes from the post-processor of tokenizer.json, no setting says so."""
    from tokenizers.processors import TemplateProcessing

    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", TINY.bos_id)])
    return tokenizer


@pytest.mark.parametrize("trained", [False, True])
def test_from_transformers_and_from_its_folder(tmp_path, trained):
    theirs = with_template(fast()) if trained else fast()
    theirs.chat_template = "hello"
    theirs.save_pretrained(tmp_path)
    for ours in (Tokenizer.from_transformers(theirs), Tokenizer.from_folder(tmp_path)):
        assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, None)
        assert ours.default_prepend_bos is trained and ours.chat_template == "hello" and ours.stop_ids == (ours.eos_id,)
        for text in odd_strings():
            if text and not (trained and text.startswith("<bos>")):  # transformers puts a second one in front
                assert ours.to_tokens(text)[0].tolist() == theirs(text)["input_ids"], text


def test_truncation_and_padding_of_the_original_do_not_follow():
    theirs = fast(pad_token="<eos>")
    theirs.backend_tokenizer.enable_truncation(2)
    theirs.backend_tokenizer.enable_padding(length=9)
    assert len(Tokenizer.from_transformers(theirs).encode("x y z")) == 5


@pytest.mark.parametrize("stated", [True, False, None])
@pytest.mark.parametrize("template", [True, False])
def test_bos_of_a_folder_is_that_of_transformers_whatever_add_bos_token_states(tmp_path, stated, template):
    theirs = with_template(fast()) if template else fast()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ({} if stated is None else {"add_bos_token": stated})))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for ours in (Tokenizer.from_folder(tmp_path), Tokenizer.from_transformers(theirs)):
        assert ours.to_tokens("the cat")[0].tolist() == theirs("the cat")["input_ids"]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("template", [True, False])
def test_bos_of_a_saved_tokenizer_is_read_back_by_transformers_too(tmp_path, trained, template):
    backend = with_template(fast()).backend_tokenizer if template else fast().backend_tokenizer
    Tokenizer(backend, bos_id=TINY.bos_id, default_prepend_bos=trained).save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for ours in (Tokenizer.from_folder(tmp_path), Tokenizer.from_transformers(theirs)):
        assert ours.default_prepend_bos is trained
        assert ours.to_tokens("the cat")[0].tolist() == theirs("the cat")["input_ids"]


def test_files_saved_when_settings_alone_stated_bos_still_say_it(tmp_path):
    TINY.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True}))
    assert Tokenizer.from_folder(tmp_path).default_prepend_bos


def test_numbers_fill_in_what_settings_leave_out(tmp_path):
    with_template(fast()).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<bos>"}}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3, "bos_token_id": 0}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    (tmp_path / "chat_template.jinja").write_text("from a file")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.default_prepend_bos and tokenizer.bos_id == TINY.bos_id
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.chat_template) == (7, (7, 8), "from a file")


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(FileRefused, match=r"no tokenizer.json in .*there: nothing.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(FileRefused, match="no such folder"):
        Tokenizer.from_folder(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text('{"model"')
    with pytest.raises(FileRefused, match=r"cannot read a tokenizer from .* damaged or of another kind"):
        Tokenizer.from_folder(tmp_path)
    TINY.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(FileRefused, match="should hold a JSON object, it holds a list"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(FileRefused, match="is not JSON"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(WrongType, match="a str has no backend_tokenizer"):
        Tokenizer.from_transformers("gpt2")


def test_saved_files_have_the_mode_of_any_other_and_nothing_stays_beside_them(tmp_path):
    old = os.umask(0o022)
    try:
        TINY.save(tmp_path / "t")
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "t").iterdir()}
    assert modes == {"tokenizer.json": 0o644, "tokenizer_config.json": 0o644}


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    TINY.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable, match="the disk is full"):
        TINY.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"chat_template": [{"nome": "x"}]}'),
        ("tokenizer_config.json", '{"bos_token": ["<bos>"]}'),
        ("tokenizer_config.json", '{"stop_token_ids": ["a"]}'),
        ("generation_config.json", '{"eos_token_id": "2"}'),
        ("generation_config.json", '{"eos_token_id": [[2]]}'),
        ("config.json", '{"eos_token_id": -2}'),
        ("tokenizer_config.json", "[" * 100_000),
    ],
)
def test_settings_of_a_wrong_type_are_refused_when_they_are_read(tmp_path, name, content):
    TINY.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / name).write_text(content)
    with pytest.raises(FileRefused, match="cannot read"):
        Tokenizer.from_folder(tmp_path)


def test_chat_template_gets_the_special_tokens():
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = Tokenizer(
        TINY.backend, bos_id=TINY.bos_id, eos_id=TINY.backend.token_to_id("<eos>"), chat_template=template
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<bos>user:hi<eos>"
    with pytest.raises(InputError, match="has no chat template; instruct models have one"):
        TINY.apply_chat_template([{"role": "user", "content": "hi"}])


def test_the_byte_alphabet_is_the_librarys():
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_values()) == set(ByteLevel.alphabet()) and sorted(byte_values().values()) == list(range(256))
