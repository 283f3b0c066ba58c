"""Prompts of the demos: sentences where the model reads text."""

from importlib import import_module

import pytest

from hooklens.data.demo_prompts import _CAPITALS, demo_pairs, demo_texts
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.testing import tiny_model

logit_lens = import_module("hooklens.plugins.lens.layer_lens")
activation = import_module("hooklens.plugins.patching.activation")


@pytest.fixture(scope="module")
def reader():
    words = "The Ġcapital Ġof Ġis " + " ".join(f"Ġ{name}" for pair in _CAPITALS.items() for name in pair)
    model = tiny_model(d_vocab=tiny_tokenizer(words).vocab_size)
    model.tokenizer = tiny_tokenizer(words)
    return model


def test_a_demo_read_ids_1_to_n_as_a_prompt_although_there_was_a_tokenizer(reader):
    texts = reader.to_string(logit_lens.demo(reader).tokens)
    assert texts == ["The capital of France is", "The capital of Italy is"]
    assert activation.demo(reader).corrupted != activation.demo(reader).clean


def test_pairs_differ_in_one_token_and_in_their_answers(reader):
    pairs = demo_pairs(reader, 12)
    assert ((pairs.clean != pairs.corrupted).sum(1) == 1).all()
    assert [reader.to_string([i]) for i in pairs.answer[:2]] == [" Paris", " Rome"]
    assert all(a != b for a, b in zip(pairs.answer, pairs.wrong_answer, strict=True))
    assert len(demo_texts(reader, 12, 99).unique(dim=0)) == 12


def test_numbers_where_the_words_are_unknown_or_do_not_fit():
    letters = tiny_model(d_vocab=tiny_tokenizer("a").vocab_size)
    letters.tokenizer = tiny_tokenizer("a")
    assert demo_pairs(letters, 2).clean.tolist() == demo_pairs(tiny_model(d_vocab=300), 2).clean.tolist()
    assert demo_texts(tiny_model(n_ctx=3), 2, 8).shape == (2, 3)
