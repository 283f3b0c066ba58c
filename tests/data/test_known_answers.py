"""Sources whose best predictor is known: a Markov chain's entropy, and least squares."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hooklens as hl
from hooklens.core.errors import InputError


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.floats(0.05, 5), st.integers(0, 10**6))
def test_cross_entropy_minus_entropy_rate_is_kl(d_vocab, concentration, seed):
    source = hl.data.markov_source(d_vocab, concentration=concentration, seed=seed)
    predicted = torch.rand(d_vocab, d_vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.01
    predicted /= predicted.sum(1, keepdim=True)
    assert source.cross_entropy(predicted) - source.entropy_rate() == pytest.approx(source.kl(predicted), abs=1e-12)
    assert source.kl(predicted) > 0 and abs(source.kl(source.transitions)) < 1e-12
    torch.testing.assert_close(source.stationary @ source.transitions, source.stationary, atol=1e-10, rtol=0)
    assert float(source.stationary.sum()) == pytest.approx(1, abs=1e-12)


def test_entropy_rates_that_are_known_on_paper():
    cycle = torch.roll(torch.eye(3), 1, dims=1)  # deterministic, and periodic
    assert hl.data.markov_source(transitions=cycle).entropy_rate() == 0
    fair = torch.full((4, 4), 0.25)
    assert hl.data.markov_source(transitions=fair).entropy_rate() == pytest.approx(math.log(4), abs=1e-12)
    a, b = 0.1, 0.4  # two states: (b H(a) + a H(b)) / (a + b)
    source = hl.data.markov_source(transitions=torch.tensor([[1 - a, a], [b, 1 - b]], dtype=torch.float64))
    binary = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (a, b)]
    assert source.entropy_rate() == pytest.approx((b * binary[0] + a * binary[1]) / (a + b), abs=1e-12)
    assert source.cross_entropy(cycle[:2, :2]) == math.inf  # what is possible was given no probability
    with pytest.raises(InputError, match=r"2 x 2; got \[3, 3\]"):
        source.kl(cycle)


def test_sequences_follow_the_transitions_from_the_stationary_distribution():
    source = hl.data.markov_source(3, window=200, seed=4)
    batch = source.batch(0, 200)
    counts = torch.zeros(3, 3, dtype=torch.float64)
    counts.index_put_((batch.inputs.flatten(), batch.targets.flatten()), torch.ones(40_000).double(), accumulate=True)
    torch.testing.assert_close(counts.sum(1) / counts.sum(), source.stationary, atol=0.02, rtol=0)
    torch.testing.assert_close(counts / counts.sum(1, keepdim=True), source.transitions, atol=0.03, rtol=0)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_a_transient_state_is_never_visited():
    rows = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.3, 0.3, 0.4]])
    source = hl.data.markov_source(transitions=rows)
    assert float(source.stationary[2]) < 1e-12 and int(source.batch(0, 50).inputs.max()) == 1


@pytest.mark.parametrize("inputs", ["uniform", "normal"])
@pytest.mark.parametrize("n_points", [4, 7])
def test_least_squares_on_the_context_gives_the_answer(n_points, inputs):
    data = hl.data.in_context_regression(4, n_points, inputs=inputs, seed=3)
    batch = data.batch(2, 32)
    x, y = batch.inputs[:, :-1, :4].double(), batch.inputs[:, :-1, 4:].double()
    w = torch.linalg.lstsq(x, y).solution
    answers = (batch.inputs[:, -1:, :4].double() @ w)[:, 0]
    # four points in four dimensions can be nearly dependent: compare where the solution is stable
    stable = torch.linalg.cond(x) < 30
    assert int(stable.sum()) >= 10
    torch.testing.assert_close(answers[stable], batch.targets[stable, -1].double(), atol=1e-4, rtol=0)
    assert bool((batch.inputs[:, -1, 4] == 0).all())  # the query does not show its answer
    assert batch.counts.sum(1).tolist() == [1] * 32 and bool(batch.counts[:, -1].all())


def test_inputs_have_the_distribution_that_is_asked_for():
    for inputs, variance in (("uniform", 1 / 12), ("normal", 1)):
        x, y, w = hl.data.in_context_regression(5, 20, inputs=inputs).draw(2000, torch.Generator().manual_seed(0))
        assert float(x.var()) == pytest.approx(variance, rel=0.03) and float(w.var()) == pytest.approx(1, rel=0.05)
        torch.testing.assert_close(y, torch.einsum("npd,nd->np", x, w), atol=1e-5, rtol=0)
    noisy = hl.data.in_context_regression(5, 20, noise=0.5)
    x, y, w = noisy.draw(2000, torch.Generator().manual_seed(0))
    assert float((y - torch.einsum("npd,nd->np", x, w)).std()) == pytest.approx(0.5, rel=0.03)


def test_interleaved_tokens_ask_at_every_point_before_its_answer_is_shown():
    plain, data = (hl.data.in_context_regression(3, 4, interleaved=flag, seed=1) for flag in (False, True))
    vectors, batch = plain.batch(0, 8), data.batch(0, 8)
    assert batch.inputs.shape == (8, 9, 4) and batch.counts[0].tolist() == [True, False] * 4 + [True]
    assert torch.equal(batch.inputs[:, ::2, :3], vectors.inputs[..., :3])  # the same tasks
    assert torch.equal(batch.inputs[:, 1::2, 3], vectors.inputs[:, :-1, 3])
    assert torch.equal(batch.targets[:, ::2, 0][:, :-1], batch.inputs[:, 1::2, 3])
    assert torch.equal(batch.targets[:, -1], vectors.targets[:, -1])
    assert not batch.inputs[:, ::2, 3].any() and not batch.inputs[:, 1::2, :3].any()
