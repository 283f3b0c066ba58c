"""Arithmetic tasks: whole tables, and digits by the long way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refused import refused

from hooklens.core.errors import InputError
from hooklens.data.decimals import decimal_arithmetic
from hooklens.data.markov_chains import markov_source
from hooklens.data.modular import modular_arithmetic
from hooklens.testing import tiny_model
from hooklens.training.loop import train


def by_counting(a, operation, b, p):
    """The answer by steps around a clock of p hours."""
    at = 0 if operation == "x" else a
    for _ in range(b):
        at = {"+": at + 1, "-": at - 1, "x": at + a}[operation]
        at = at % p
    return at


@pytest.mark.parametrize("operation", ["+", "-", "x"])
@pytest.mark.parametrize("p", [2, 3, 4, 7])  # primes or not
def test_the_whole_table_is_right_and_split_once(p, operation):
    data = modular_arithmetic(p, operation=operation, fraction=0.6, seed=5)
    train, held_out = data.pairs
    assert len(train) == int(0.6 * p * p)
    every = [tuple(pair) for pair in torch.cat([train, held_out]).tolist()]
    assert sorted(every) == [(a, b) for a in range(p) for b in range(p)]  # disjoint and exhaustive
    batch = data.examples(torch.cat([train, held_out]))
    assert batch.counts.tolist() == [[False, False, True]] * p**2
    for (a, b), inputs, targets in zip(every, batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert inputs == [a, b, p] and targets[2] == by_counting(a, operation, b, p)


def test_the_split_is_stable_and_the_fraction_may_be_one():
    first, again, other = (modular_arithmetic(11, seed=seed).pairs[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    whole = modular_arithmetic(5, fraction=1.0)
    assert not list(whole.held_out(8)) and len(whole.batch(0, 1000)) == 25
    # a larger fraction only adds pairs, so that runs on two fractions can be compared
    assert torch.equal(modular_arithmetic(11, fraction=0.5).pairs[0][: len(first)], first)


def test_prompts_of_numbers_are_read_and_written_as_text(tmp_path):
    data = modular_arithmetic(p=11, fraction=0.8)
    model = tiny_model(d_vocab=data.d_vocab)
    run = train(model, data, steps=1, out=tmp_path / "run")
    for reader in (model, run.checkpoints()[-1].load()):  # as trained, and from its checkpoint
        tokens = reader.to_tokens("3 10 =")
        assert tokens.tolist() == [[3, 10, 11]] and reader.to_string(tokens) == ["3 10 ="]
        assert reader.to_str_tokens(tokens) == ["3", "10", "="] and reader.to_single_token("10") == 10
        assert torch.equal(reader("3 10 ="), reader(tokens))
    with pytest.raises(InputError, match=r"holds '\+', which is none of the 12 tokens"):
        model.to_tokens("3 + 4 =")
    states = markov_source(5, window=4)
    assert states.tokenizer.encode("0 4 1") == [0, 4, 1]


def test_shuffled_answers_are_those_of_the_table_at_other_places():
    plain, shuffled = (modular_arithmetic(11, seed=3, shuffled=shuffled) for shuffled in (False, True))
    assert sorted(shuffled.table.flatten().tolist()) == sorted(plain.table.flatten().tolist())
    assert float((shuffled.table == plain.table).double().mean()) < 0.3  # 1/11 is expected
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain.pairs, shuffled.pairs, strict=True))
    answers = torch.cat([batch.targets[:, -1] for batch in shuffled.held_out(7)])
    assert torch.equal(answers, shuffled.table[tuple(shuffled.pairs[1].T)])
    assert torch.equal(shuffled.table, modular_arithmetic(11, seed=3, shuffled=True).table)
    assert not torch.equal(shuffled.table, modular_arithmetic(11, seed=4, shuffled=True).table)


def test_shuffled_answers_are_other_data_and_plain_ones_those_of_older_runs():
    plain, shuffled = (modular_arithmetic(7, shuffled=shuffled) for shuffled in (False, True))
    assert set(plain.identity()) == {"task", "p", "operation", "fraction", "seed"}
    assert shuffled.identity() == plain.identity() | {"shuffled": True}
    assert "no rule" in shuffled.description() and "no rule" not in plain.description()
    with refused(InputError, "shuffled is True or False, got 1"):
        modular_arithmetic(7, shuffled=1)


def test_an_epoch_of_batches_is_the_training_set():
    data = modular_arithmetic(5, fraction=0.8)
    rows = torch.cat([data.batch(step, 4).inputs[:, :2] for step in range(5)])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, data.pairs[0].tolist()))


def column_sum(a: str, b: str) -> str:
    """Addition as in school, from the last digit, without int() of a whole number."""
    width = max(len(a), len(b))
    digits, carry = [], 0
    for left, right in zip(reversed(a.rjust(width, "0")), reversed(b.rjust(width, "0")), strict=True):
        carry, digit = divmod("0123456789".index(left) + "0123456789".index(right) + carry, 10)
        digits.append(str(digit))
    return "".join(reversed([*digits, str(carry)])).lstrip("0") or "0"


def check(a: str, operation: str, b: str, answer: str) -> bool:
    """Whether a problem's answer is right, by additions only."""
    if operation == "+":
        return column_sum(a, b) == answer
    if operation == "-":  # a - b = c means b + c = a, a - b = -c means a + c = b
        negative = answer.startswith("-")
        return column_sum(a if negative else b, answer.lstrip("-")) == (b if negative else a)
    total = "0"
    for place, digit in enumerate(reversed(b)):
        for _ in range("0123456789".index(digit)):
            total = column_sum(total, a + "0" * place)
    return total == answer


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.sampled_from("+-x"), st.booleans(), st.booleans(), st.integers(0, 99))
def test_every_row_is_a_right_problem(digits, operation, reverse, zeros, seed):
    data = decimal_arithmetic(digits, operation=operation, reverse=reverse, zeros=zeros, seed=seed)
    batch = data.batch(seed, 6)
    whole = torch.cat([batch.inputs[:, :1], batch.targets], 1)
    counted = torch.cat([torch.zeros(6, 1, dtype=torch.bool), batch.counts], 1)
    for text, counts in zip(data.tokenizer.to_string(whole), counted.tolist(), strict=True):
        problem, dots = text.split(".", 1)
        assert set(dots) <= {"."} and len(text) == data.width
        left, answer = problem.split("=")
        a, b = left.split(operation)
        answer = answer[::-1] if reverse else answer
        assert not zeros or (len(a) == len(b) == digits and len(answer) == data.answer_width)
        bare = [number.lstrip("0") or "0" for number in (a, b)]
        sign, size = ("-", answer[1:]) if answer.startswith("-") else ("", answer)
        assert check(bare[0], operation, bare[1], sign + (size.lstrip("0") or "0"))
        # what counts is the answer and the mark behind it
        assert [i for i, counted in enumerate(counts) if counted] == list(range(len(left) + 1, len(problem) + 1))
        assert not data.is_held_out(int(bare[0]), int(bare[1]))


def test_the_issue_of_problems_written_as_people_write_them():
    assert decimal_arithmetic(2).problem(12, 34) == "12+34=46"
    assert decimal_arithmetic(2, reverse=True).problem(12, 34) == "12+34=64"
    assert decimal_arithmetic(3, zeros=True).problem(12, 34) == "012+034=0046"


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_held_out_problems_are_distinct_and_no_others(digits):
    data = decimal_arithmetic(digits, held_out=0.2)
    problems = data.held_out_problems
    assert len(set(problems)) == len(problems) and all(data.is_held_out(a, b) for a, b in problems)
    if digits == 1:
        assert sorted(problems) == [(a, b) for a in range(10) for b in range(10) if data.is_held_out(a, b)]
        assert 5 <= len(problems) <= 40
    else:
        assert len(problems) == 256
