"""Named labels are balanced, and the token that is read says nothing."""

import pytest
import torch

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.plugins.probing.labels import (
    NEGATIVE,
    NOUN_OR_VERB,
    NOUNS,
    POSITIVE,
    TASKS,
    next_vowel,
    part_of_speech,
    vowel_tokens,
)
from hooklens.plugins.probing.probe_training import train_probe
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.testing import tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(" ".join(f"Ġ{word}" for word in (*NOUN_OR_VERB, *_vowel_and_other())))


def _vowel_and_other():
    return [f"{v}{a}{b}{c}" for v in "aeiou" for a in "lmn" for b in "ae" for c in "rst"][:70] + [
        f"{v}{a}{b}{c}" for v in "bcdfg" for a in "lmn" for b in "ae" for c in "rst"
    ][:70]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_balanced_and_repeats(name, tokenizer):
    task = TASKS[name](tokenizer)
    assert len(task) >= 100 and int(task.group.max()) >= 9
    counts = torch.bincount(task.label)
    assert counts[0] == counts[1] and len(task.classes) == 2
    assert len(set(task.texts)) == len(task)
    assert sum(task.figure().data[0].y) == len(task) and len(task.figure().data[0].y) == 2
    again, other = TASKS[name](tokenizer), TASKS[name](tokenizer, seed=1)
    assert again.texts == task.texts and other.texts != task.texts
    assert tokenizer.to_string(task.tokens[0]) == task.texts[0]
    assert all(int(p) == len(row) - 1 for p, row in zip(task.pos, task.tokens, strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_the_token_that_is_read_says_nothing(name, tokenizer):
    """Every last token (by the word it ends, where a tokenizer splits it) stands as often in either class."""
    task = TASKS[name](tokenizer)
    last = [text.split(" ")[-1] for text in task.texts]
    for word in set(last):
        labels = [int(task.label[i]) for i in range(len(task)) if last[i] == word]
        assert 2 * sum(labels) == len(labels)


def test_no_entity_stands_in_two_groups(tokenizer):
    for make in TASKS.values():
        task = make(tokenizer)
        group = task.group.tolist()
        where: dict[str, set[int]] = {}
        for number, names in zip(group, task.entities, strict=True):
            for name in names:
                where.setdefault(name, set()).add(number)
        assert all(len(groups) == 1 for groups in where.values())


def test_the_words_are_what_they_are_said_to_be(tokenizer):
    assert not set(POSITIVE) & set(NEGATIVE) and len(POSITIVE) == len(NEGATIVE)
    assert len(set(NOUNS)) == len(NOUNS) and len(NOUNS) % 2 == 0
    sums = TASKS["sum_over_50"](tokenizer)
    for text, label in zip(sums.texts, sums.label.tolist(), strict=True):
        a, b = text.removesuffix(" =").split(" + ")
        assert (int(a) + int(b) > 50) == bool(label)
    for text, label in zip(*(lambda t: (t.texts, t.label.tolist()))(next_vowel(tokenizer)), strict=True):
        a, b, *rest = text[1:].split(" ")
        assert rest == [a, b, a] and (b[0] in "aeiou") == bool(label)
    number = TASKS["subject_number"](tokenizer)
    for text, label in zip(number.texts, number.label.tolist(), strict=True):
        assert text.split(" ")[1].endswith("s") == bool(label)
    speech = part_of_speech(tokenizer)
    for text, label in zip(speech.texts, speech.label.tolist(), strict=True):
        assert text.split(" ")[-2] == ("to" if label else "the")
    feeling = TASKS["sentiment"](tokenizer)
    for text, label in zip(feeling.texts, feeling.label.tolist(), strict=True):
        words = text.split(".")[0].split(" ")
        assert (words[-1] in POSITIVE) ^ ("not" in words) == bool(label)


def test_the_mean_embedding_of_a_part_of_speech_says_nothing(tokenizer):
    """A noun frame is its verb frame in another order."""
    task = part_of_speech(tokenizer)
    bags = [tuple(sorted(row.tolist())) for row in task.tokens]
    for bag in set(bags):
        assert sorted(int(task.label[i]) for i in range(len(task)) if bags[i] == bag) == [0, 1]


def test_a_tokenizer_that_cannot_is_told_so():
    bare = tiny_tokenizer("the")
    with pytest.raises(InputError, match="one token with a leading space"):
        part_of_speech(bare)
    with pytest.raises(InputError, match="this tokenizer has 0 with a vowel"):
        next_vowel(bare)
    with pytest.raises(InputError, match="no tokenizer"):
        TASKS["sentiment"](tiny_model())


def test_vowel_tokens_are_words_of_the_vocabulary(tokenizer):
    ids, label = vowel_tokens(tokenizer, 60)
    for text, one in zip(tokenizer.to_str_tokens(ids), label.tolist(), strict=True):
        assert text[0] == " " and len(text) > 4 and (text[1] in "aeiou") == bool(one)
    assert len(set(ids.tolist())) == 60


@pytest.mark.slow
def test_every_task_on_smollm2():
    """Number and sentiment are read far beyond the embeddings, and the last tokens say nothing."""
    model = hl.load("smollm2-135m-instruct")
    for name, make in TASKS.items():
        task = make(model)
        _, study = train_probe(model, task, site=[("resid_post", layer) for layer in (8, 18, 28)], null_draws=19)
        assert float(study.embed.mean()) <= 0.51
        if name in ("subject_number", "sentiment"):
            assert study.accuracy > 0.9 and study.accuracy > float(study.context.mean()) + 0.15
