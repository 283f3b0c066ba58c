"""Greater-than and gendered pronouns as prompt pairs: answer sets by arithmetic, names by their gender."""

import json
import re

import pytest
import tokenizers
import torch

import hooklens as hl
from hooklens.core.errors import HooklensError
from hooklens.data.pronouns import MEN, WOMEN
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.testing import tiny_model

CENTURIES = [f"Ġ{century}" for century in range(11, 18)]
TWO_DIGITS = [f"{year:02d}" for year in range(100)]


def in_pairs():
    """A tokenizer that reads " 1732" as " 17" and "32"."""
    return tiny_tokenizer(" ".join([*CENTURIES, *TWO_DIGITS]))


def greater(clean):
    """The bound and the century that a prompt states."""
    start, again = re.fullmatch(r"The \w+ lasted from the year (\d{4}) to the year (\d{2})", clean).groups()
    assert start[:2] == again
    return int(start[2:])


def test_every_answer_set_is_right_by_arithmetic():
    tokenizer = in_pairs()
    pairs = hl.data.greater_than(tokenizer, 200)
    assert len(pairs) == 200 and len(set(pairs["year"])) > 60
    for row, clean in enumerate(pairs.clean):
        bound = greater(clean)
        assert bound == pairs["year"][row] and 2 <= bound <= 98
        for year, digits in enumerate(TWO_DIGITS):
            token = tokenizer.to_single_token(digits)
            assert bool(pairs.metric.right[row, token]) == (year > bound)
            assert bool(pairs.metric.wrong[row, token]) == (year <= bound)
        assert int(pairs.metric.right[row].sum() + pairs.metric.wrong[row].sum()) == 100
        # the corrupted prompt differs in the year only
        assert pairs.corrupted[row] == clean.replace(f"{bound:02d} to", "01 to")


def test_single_digits_are_compared_by_their_tens():
    tokenizer = tiny_tokenizer(" ".join(CENTURIES))
    pairs = hl.data.greater_than(tokenizer, 100)
    for row, clean in enumerate(pairs.clean):
        tens = greater(clean) // 10
        for digit in range(10):
            token = tokenizer.to_single_token(str(digit))
            assert bool(pairs.metric.right[row, token]) == (digit > tens)
            assert bool(pairs.metric.wrong[row, token]) == (digit < tens)


def test_years_that_are_one_token_are_left_out():
    """GPT-2 has a token for 1776 and for some round years."""
    tokenizer = with_whole_years()
    assert [len(tokenizer.encode(year)) for year in (" 1775", " 1776", " 1101")] == [2, 1, 1]
    pairs = hl.data.greater_than(tokenizer, 5000)
    years = {(century, year) for century, year in zip(pairs["century"], pairs["year"], strict=True)}
    assert (17, 76) not in years and any(century == 17 for century, _ in years) and (16, 76) in years
    assert 11 not in pairs["century"]  # " 1101", the corrupted prompt's, is one token there


def with_whole_years():
    """A tokenizer that has 1776 and 1101 as one token."""
    base = in_pairs()
    model = json.loads(base.backend.to_str())
    for century, year in (("Ġ17", "76"), ("Ġ11", "01")):
        model["model"]["vocab"][century + year] = len(model["model"]["vocab"])
        model["model"]["merges"].append([century, year])
    return type(base)(tokenizers.Tokenizer.from_str(json.dumps(model)))


def test_the_metric_is_the_mass_of_years_above_minus_that_below():
    tokenizer = in_pairs()
    model = tiny_model(d_vocab=tokenizer.vocab_size, n_ctx=64, dtype=torch.float64)
    model.tokenizer = tokenizer
    pairs = hl.data.greater_than(model, 6)
    tokens = pairs.tokens(model)[0]
    with torch.no_grad():
        logits = model(tokens)
    probs = logits[:, -1].softmax(-1)
    expected = []
    for row, clean in enumerate(pairs.clean):
        mass = [float(probs[row, tokenizer.to_single_token(digits)]) for digits in TWO_DIGITS]
        bound = greater(clean)
        expected.append(sum(mass[bound + 1 :]) - sum(mass[: bound + 1]))
    torch.testing.assert_close(pairs.metric(logits), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    some = pairs[2:4]
    torch.testing.assert_close(some.metric(logits[2:4]), pairs.metric(logits)[2:4], atol=0, rtol=0)
    assert hl.patch(model, pairs, site="z").how == "engine"
    # all mass on 99 is 1, all on 00 is -1
    sure = torch.full_like(logits, -1e9)
    sure[..., tokenizer.to_single_token("99")] = 0
    assert pairs.metric(sure).tolist() == [1.0] * 6
    sure.fill_(-1e9)
    sure[..., tokenizer.to_single_token("00")] = 0
    assert pairs.metric(sure).tolist() == [-1.0] * 6


def named(*words):
    return tiny_tokenizer(" ".join(f"Ġ{word}" for word in words))


def test_only_the_name_tells_the_pronoun():
    tokenizer = named(*WOMEN, *MEN, "he", "she")
    pairs = hl.data.gendered_pronouns(tokenizer, 64)
    for i, (clean, corrupted) in enumerate(zip(pairs.clean, pairs.corrupted, strict=True)):
        name, other = pairs["name"][i], pairs["other_name"][i]
        assert (name in WOMEN, other in MEN) == (pairs.answer[i] == " she",) * 2 and (other in WOMEN) != (name in WOMEN)
        assert clean.replace(name, other) == corrupted and clean != corrupted
        assert {pairs.answer[i], pairs.wrong_answer[i]} == {" she", " he"}
    assert pairs.answer.count(" she") == 32
    # the two pairs of a group are one another's corrupted prompts
    assert pairs.clean[::2] == pairs.corrupted[1::2] and pairs.group.tolist() == [i // 2 for i in range(64)]
    lengths = {len(tokenizer.encode(prompt)) for prompt in [*pairs.clean, *pairs.corrupted]}
    assert len(lengths) == 1 and len(set(pairs["template"])) > 1
    assert not set(WOMEN) & set(MEN)


def test_pairs_are_a_function_of_the_seed():
    tokenizer = named(*WOMEN, *MEN, "he", "she")
    for task, given in ((hl.data.gendered_pronouns, tokenizer), (hl.data.greater_than, in_pairs())):
        assert task(given, 8).clean == task(given, 8).clean != task(given, 8, seed=1).clean
        halves = task(given, 40).split(seed=0)
        assert not set(halves[0].group.tolist()) & set(halves[1].group.tolist())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hl.data.greater_than(named("17x"), 0), "n is a whole number of at least 1"),
        (lambda: hl.data.greater_than(tiny_model(), 4), "this model has no tokenizer"),
        (lambda: hl.data.greater_than("gpt2", 4), "made for a model or a Tokenizer, got 'gpt2'"),
        (
            lambda: hl.data.greater_than(tiny_tokenizer("173 10 20"), 4),
            "greater-than needs a tokenizer that splits years",
        ),
        (lambda: hl.data.gendered_pronouns(named("Mary", "John", "he", "she"), 3), "a multiple of 2"),
        (
            lambda: hl.data.gendered_pronouns(named("Mary", "John"), 4),
            "1 of 18 women's names, 1 of 18 men's names, and 0",
        ),
        (lambda: hl.data.gendered_pronouns(named("Mary", "he", "she"), 4), "0 of 18 men's names, and 2"),
        (lambda: hl.data.gendered_pronouns(tiny_model(), 4), "this model has no tokenizer"),
    ],
)
def test_what_makes_no_pairs_is_refused(call, message):
    with pytest.raises(HooklensError, match=message):
        call()
