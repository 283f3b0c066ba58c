"""Byte pairs: the tokens are those of the tokenizers package."""

import random

import pytest
from refused import refused
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import hooklens as hl
from hooklens.core.errors import InputError, WrongType
from hooklens.pretrained.byte_letters import byte_values, in_letters
from hooklens.scratch import train_byte_pairs
from hooklens.scratch.bpe import words

TEXTS = {
    "english": [
        "The quick brown fox jumps over the lazy dog; the dog doesn't mind, it's lazy.",
        "They'll say: lower, lowest!",
    ],
    "repeated letters": ["aaaa aaa aa a aaaaaaaaa", "abababab babababa"],
    "ties": ["ab cd ef gh", "zy yx xw", "ba dc"],
    "ties of bytes in the order of letters": ["\x00\x01 é\x7f ÿ\xad~! é\x7f"],
    "accents": ["été à la forêt, Äpfel und Öl; naïve café", "e\u0301te\u0301 composed of two code points"],
    "scripts": ["日本語のテキスト、日本語です。", "Привет, мир! Привет!", "नमस्ते दुनिया", "שלום עולם"],
    "emoji": ["👩‍👩‍👧 family 👍👍🏽 thumbs 👍"],
    "spaces": ["  two  spaces   and\ttabs\n\nlines \n ends  ", "\u00a0no break\u2003em\u3000ideographic\u0085next"],
    "digits": ["1 12 123 1234 12345 ½ ² Ⅷ ٣٤ 1,000.50"],
    "code": ["def f(x):\n    return x_1 + x__2  # a'b don't I've we're 'll 'S"],
    "one character": ["x"],
}


def in_alphabet(piece):
    letters = {byte: letter for letter, byte in byte_values().items()}
    return "".join(letters[byte] for byte in piece)


def peer(texts, d_vocab):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=d_vocab, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


@pytest.mark.parametrize("name", TEXTS)
def test_vocabulary_and_tokens_equal_those_of_the_tokenizers_package(name):
    texts = TEXTS[name]
    for d_vocab in (256, 257, 264, 300, 400):
        ours, theirs = train_byte_pairs(texts, d_vocab), peer(texts, d_vocab)
        assert {in_alphabet(piece): number for number, piece in enumerate(ours.vocabulary)} == theirs.get_vocab()
        for text in [text for several in TEXTS.values() for text in several]:
            tokens = ours.encode(text)
            assert tokens == theirs.encode(text).ids
            assert ours.decode(tokens) == text


def test_random_texts_have_the_tokens_of_the_tokenizers_package():
    draw = random.Random(0)
    for alphabet in ("ab", "ab ", "abc'st 12", "aé日 \n", "aab12 .,!\t", " \u00a0\u2003\u0085\x1c\u200bab"):
        for _ in range(5):
            texts = ["".join(draw.choices(alphabet, k=draw.randint(1, 60))) for _ in range(3)]
            other, d_vocab = "".join(draw.choices(alphabet, k=60)), 256 + draw.randint(0, 60)
            assert train_byte_pairs(texts, d_vocab).encode(other) == peer(texts, d_vocab).encode(other).ids


@pytest.mark.parametrize("name", TEXTS)
def test_words_are_those_of_the_tokenizers_package(name):
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in TEXTS[name]:
        assert [in_letters(word) for word in words(text)] == [word for word, _ in split.pre_tokenize_str(text)]


def test_the_most_frequent_pair_is_merged_first_and_no_merge_crosses_a_word():
    # counted by hand: "lo" and "ow" 3 times each, "we" twice ("lower", "lowest"); l precedes o among the tokens
    tokenizer = train_byte_pairs(["low", "lower", "lowest"], 259)
    assert tokenizer.merges == ((b"l", b"o"), (b"lo", b"w"), (b"low", b"e"))
    assert train_byte_pairs(["a b a b a b"], 300).vocabulary[256:] == [b" b", b" a"]


def test_what_is_no_text_is_refused():
    for nothing in ([], [""], ["", ""]):
        with refused(InputError, "learned from text, and there is none"):
            train_byte_pairs(nothing, 300)
    with refused(WrongType, r"got one text, whose characters would be read one by one; use \[text\]"):
        train_byte_pairs("abc", 300)
    with refused(InputError, "d_vocab is a whole number of at least 256, got 255"):
        train_byte_pairs(["abc"], 255)
    assert train_byte_pairs(["abc"], 300).encode("") == [] and train_byte_pairs(["abc"], 300).decode([]) == ""


def test_unknown_tokens_and_half_characters():
    tokenizer = train_byte_pairs(["é"], 256)
    first, _ = tokenizer.encode("é")
    assert tokenizer.decode([first]) == "\ufffd"
    for token in (-1, 256):
        with refused(InputError, "tokens are 0 to 255"):
            tokenizer.decode([token])


def test_the_module_is_reached_by_its_name():
    assert hl.scratch.bpe.words is words and hl.scratch.train_byte_pairs is train_byte_pairs
