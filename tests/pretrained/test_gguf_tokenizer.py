"""Tokenizers rebuilt from GGUF metadata against transformers' own conversion of the same metadata."""

import tracemalloc

import pytest
from gguf_metadata import SPECIAL, byte_level, sentencepiece
from odd_strings import odd_strings
from tokenizers import Tokenizer as Backend
from transformers.integrations.gguf import convert_gguf_tokenizer

from hooklens.core.errors import FileRefused
from hooklens.pretrained.gguf_tokenizer import PRE_TOKENIZERS
from hooklens.pretrained.tokenizer import Tokenizer


def theirs(metadata: dict) -> Backend:
    """transformers' conversion."""
    short = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    names = {"model": "tokenizer_type", "pre": "pre_tokenizer_type", "add_space_prefix": "add_prefix_space"}
    given = {names.get(key, key): value for key, value in short.items()}
    return convert_gguf_tokenizer(metadata["general.architecture"], given)[0]


def differences(metadata: dict) -> list[str]:
    """The odd strings on which the two disagree, in ids or in the text that comes back."""
    ours, other, wrong = Tokenizer.from_gguf(metadata), theirs(metadata), []
    for text in odd_strings():
        ids = other.encode(text, add_special_tokens=False).ids
        if ours.encode(text) != ids or (ids and ours.to_string(ids) != other.decode(ids, skip_special_tokens=False)):
            wrong.append(text)
    return wrong


@pytest.mark.parametrize("pre", ["default", "gpt-2", "llama-bpe", "dbrx", "tekken", "gpt-4o"])
def test_byte_level_equals_transformers(pre):
    assert differences(byte_level(pre)) == []


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "phi3"])
def test_sentencepiece_equals_transformers(architecture):
    assert differences(sentencepiece(architecture)) == []


def test_ties_between_scores_are_broken_as_transformers_does():
    metadata = sentencepiece()
    metadata["tokenizer.ggml.scores"] = [0.0] * len(metadata["tokenizer.ggml.scores"])
    assert differences(metadata) == []


def numeric(text: str) -> bool:
    return any(character.isnumeric() for character in text)


def test_smollm_splits_digits_and_transformers_does_not():
    """Both statements: equal on strings without digits; with them, ours are single and transformers' merged."""
    metadata = byte_level("smollm")
    assert [text for text in differences(metadata) if not numeric(text)] == []
    ours, other = Tokenizer.from_gguf(metadata), theirs(metadata)
    assert ours.to_str_tokens(" 1234567") == [" ", "1", "2", "3", "4", "5", "6", "7"]
    assert len(other.encode("1234567", add_special_tokens=False).ids) < 7


def composed(text: str) -> bool:
    import unicodedata

    return unicodedata.is_normalized("NFC", text)


def test_qwen2_composes_characters_as_its_own_tokenizer_does():
    """transformers' conversion leaves out the NFC step of Qwen2's tokenizer.json; equal where it changes nothing."""
    metadata = byte_level("qwen2")
    assert [text for text in differences(metadata) if composed(text)] == []
    ours = Tokenizer.from_gguf(metadata)
    assert ours.encode("nai\u0308ve") == ours.encode("naïve")


def test_qwen2_equals_transformers_own_class():
    from transformers import Qwen2Tokenizer

    metadata = byte_level("qwen2")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
    reference = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    reference.add_special_tokens({"additional_special_tokens": SPECIAL})
    ours = Tokenizer.from_gguf(metadata)
    for text in odd_strings():
        assert ours.encode(text) == reference.backend_tokenizer.encode(text, add_special_tokens=False).ids, text


def test_a_file_that_wants_no_space_in_front_gets_none():
    """transformers ignores tokenizer.ggml.add_space_prefix."""
    ours = Tokenizer.from_gguf(sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}))
    usual = Tokenizer.from_gguf(sentencepiece())
    assert ours.to_str_tokens("a", prepend_bos=False) == ["a"]
    assert usual.to_str_tokens("a", prepend_bos=False) in ([" a"], [" ", "a"])
    assert ours.to_string(ours.encode(" a b")) == " a b"


def test_user_defined_words_are_matched_whole_but_are_not_special():
    metadata = byte_level("gpt-2")
    metadata["tokenizer.ggml.tokens"] += ["<think>"]
    metadata["tokenizer.ggml.token_type"] += [4]
    ours = Tokenizer.from_gguf(metadata)
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert ours.encode("a<think>") == [*ours.encode("a"), last] and last not in ours.special_ids
    assert differences(metadata) == []


def test_a_file_that_does_not_say_how_it_splits_text_is_refused_unless_it_is_gpt2():
    """Llama-3-like metadata without tokenizer.ggml.pre was split as GPT-2's, and lost its BOS."""
    with pytest.raises(FileRefused, match=r"does not say how it splits text \(tokenizer.ggml.pre\).*tokenizer=folder"):
        Tokenizer.from_gguf(byte_level(None))
    own = Tokenizer.from_gguf(byte_level(None, **{"general.architecture": "gpt2"}))
    named = Tokenizer.from_gguf(byte_level("gpt-2"))
    assert all(own.encode(text) == named.encode(text) for text in odd_strings())


@pytest.mark.parametrize(
    ("metadata", "default"),
    [
        (byte_level("gpt-2"), False),
        (byte_level("llama-bpe"), True),
        (byte_level("llama-bpe", **{"tokenizer.ggml.add_bos_token": False}), False),
        (byte_level("gpt-2", **{"tokenizer.ggml.add_bos_token": True}), True),
        (sentencepiece(), True),
        (sentencepiece(**{"tokenizer.ggml.add_bos_token": False}), False),
    ],
)
def test_bos_as_the_file_says(metadata, default):
    assert Tokenizer.from_gguf(metadata).default_prepend_bos is default


def test_stop_tokens_and_template():
    tokenizer = Tokenizer.from_gguf(
        byte_level("gpt-2", **{"tokenizer.ggml.eot_token_id": 3, "tokenizer.chat_template": "{{ messages }}"})
    )
    assert tokenizer.stop_ids == (1, 3) and tokenizer.chat_template == "{{ messages }}" and tokenizer.eos_id == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tokenizer.ggml.pre": "klingon"}, r"splits text as 'klingon'.*known: default, gpt-2"),
        ({"tokenizer.ggml.model": "t5"}, r"has the type 't5'; supported types: 'gpt2'"),
        ({"tokenizer.ggml.tokens": None}, r"has no tokenizer\.ggml\.tokens.*it has model"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "merge 0 of the file is 'a b c'"),
        ({"tokenizer.ggml.merges": ["qqq zzz"]}, "merges do not match its vocabulary"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": None}, "2 entries, only 1 distinct"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, r"eos_token_id = 1000000 lies outside its vocabulary"),
    ],
)
def test_metadata_that_cannot_be_used(change, why):
    metadata = {key: value for key, value in (byte_level("gpt-2") | change).items() if value is not None}
    with pytest.raises(FileRefused, match=why):
        Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_known_rule_loses_nothing(pre):
    tokenizer = Tokenizer.from_gguf(byte_level(pre))
    for text in odd_strings(160):
        if composed(text) or not PRE_TOKENIZERS[pre].compose:
            assert tokenizer.to_string(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_smollm2_of_the_real_file():
    from hooklens.pretrained.assets import fetch
    from hooklens.pretrained.gguf import read_gguf

    metadata = read_gguf(fetch("smollm2-135m-instruct")).metadata
    assert [text for text in differences(metadata) if not numeric(text)] == []
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.vocab_size == 49152 and not tokenizer.default_prepend_bos
    assert tokenizer.to_str_tokens("in 1999, John") == ["in", " ", "1", "9", "9", "9", ",", " John"]
    # Its merges hold no digits, so that the missing split shows only after spaces: the last one sticks to the digit.
    assert tokenizer.to_str_tokens("in  1") == ["in", "  ", "1"]
    assert theirs(metadata).encode("in  1", add_special_tokens=False).tokens == ["in", "Ġ", "Ġ", "1"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.to_tokens(chat)[0, 0] == tokenizer.bos_id == 1


def test_a_token_of_200_kB_is_refused_and_one_of_1000_characters_costs_little():
    """Every way to split a token was held at once: 5.7 GB for this one."""
    long = sentencepiece()
    long["tokenizer.ggml.tokens"][-1] = "a" * 200_000
    with pytest.raises(FileRefused, match="a token of 200,000 characters"):
        Tokenizer.from_gguf(long)
    long["tokenizer.ggml.tokens"][-1] = "a" * 1000
    tracemalloc.start()
    Tokenizer.from_gguf(long)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("number", [-1, -(2**63), 1e300, "1", True])
@pytest.mark.parametrize("name", ["bos", "padding", "eot"])
def test_a_special_token_that_is_no_id_of_the_vocabulary_is_refused(name, number):
    with pytest.raises(FileRefused, match=r"_token_id = .* lies outside its vocabulary|TypeCheckError"):
        Tokenizer.from_gguf(byte_level("gpt-2", **{f"tokenizer.ggml.{name}_token_id": number}))
