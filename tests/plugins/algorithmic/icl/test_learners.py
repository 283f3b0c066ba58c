"""Learners against their closed forms: gains, expected errors, best steps, and what reduces to what."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refused import refused

import hooklens as hl
from hooklens.core.errors import HooklensError
from hooklens.plugins.algorithmic.icl.best_steps import (
    best_constant_steps,
    best_gd_plus_plus,
    best_preconditioner,
    best_step,
    best_step_schedules,
    spectral_errors,
    with_larger,
)
from hooklens.plugins.algorithmic.icl.expected_errors import expected_error, measure_depth_gap
from hooklens.plugins.algorithmic.icl.input_moments import (
    InputMoments,
    draw_spectra,
    independent_moments,
    moments_of,
    normal_moments,
    uniform_moments,
)
from hooklens.plugins.algorithmic.icl.learners import (
    Averaging,
    GDPlusPlus,
    GradientDescent,
    LeastSquares,
    PreconditionedStep,
    Ridge,
    Zero,
)
from hooklens.plugins.algorithmic.icl.regression_prompts import RegressionPrompts, draw_prompts, prompts_of

DOUBLE = torch.zeros((), dtype=torch.float64)
rates = st.lists(st.floats(-1, 1), min_size=1, max_size=4)


def drawn(d, k, seed=0, tasks=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, k, d, generator=generator, dtype=torch.float64)
    return x, torch.randn(tasks, k, generator=generator, dtype=torch.float64)


def identity(d):
    return torch.eye(d, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 4), k=st.integers(1, 6), steps=rates, mean=st.booleans(), seed=st.integers(0, 99))
def test_the_weights_of_every_learner_are_its_gain_at_s_times_b(d, k, steps, mean, seed):
    x, y = drawn(d, k, seed)
    size = 0.2 if mean else 0.2 / k
    eta, gamma = tuple(size * r for r in steps), tuple(0.5 * size * r for r in reversed(steps))
    values, vectors = torch.linalg.eigh(x.mT @ x / k)
    b = torch.einsum("tpd,tp->td", x, y) / k
    learners = [Zero(), Averaging(0.7), GradientDescent(eta, mean), GDPlusPlus(eta, gamma, mean), Ridge(0.3)]
    for learner in [*learners, LeastSquares()]:
        by_gain = vectors @ (learner.gain(values.clamp_min(0), k)[..., None] * (vectors.mT @ b[..., None]))
        scale = float(by_gain.abs().amax()) + 1
        torch.testing.assert_close(learner.weights(x, y), by_gain[..., 0], atol=1e-9 * scale, rtol=1e-6)


def test_gd_plus_plus_is_the_published_one_with_either_mean():
    """von Oswald et al., appendix A.10: each token (x, y) adds diag(-gamma I, -eta / k) (sum of (x, y) x^T) x."""
    x, y = drawn(3, 5)
    query, eta, gamma, k = torch.tensor([[0.3, -1.0, 0.8]], dtype=x.dtype).expand(4, 3), (0.4, 0.2), (0.03, 0.05), 5
    tokens = torch.cat([torch.cat([x, query[:, None]], 1), torch.cat([y, torch.zeros_like(y[:, :1])], 1)[..., None]], 2)
    for rate, shrink in zip(eta, gamma, strict=True):
        examples = tokens[:, :k]
        scale = torch.tensor([-shrink] * 3 + [-rate / k], dtype=x.dtype)
        tokens = tokens + tokens[..., :3] @ (examples[..., :3].mT @ examples) * scale
    published = -tokens[:, -1, -1]
    averaged = GDPlusPlus(eta, tuple(k * g for g in gamma)).weights(x, y)
    summed = GDPlusPlus(tuple(r / k for r in eta), gamma, mean=False).weights(x, y)
    torch.testing.assert_close((averaged * query).sum(-1), published)
    torch.testing.assert_close((summed * query).sum(-1), published)


@settings(max_examples=20, deadline=None)
@given(d=st.integers(1, 4), k=st.integers(1, 6), steps=rates, seed=st.integers(0, 99))
def test_what_reduces_to_what(d, k, steps, seed):
    x, y = drawn(d, k, seed)
    eta, none = tuple(steps), (0.0,) * len(steps)
    plain = GradientDescent(eta).weights(x, y)
    torch.testing.assert_close(GDPlusPlus(eta, none).weights(x, y), plain)
    torch.testing.assert_close(GradientDescent(tuple(r / k for r in eta), mean=False).weights(x, y), plain)
    one = GradientDescent(steps[0]).weights(x, y)
    torch.testing.assert_close(PreconditionedStep(steps[0] * identity(d)).weights(x, y), one)
    torch.testing.assert_close(Averaging(2.0).weights(x, y), GradientDescent(0.5).weights(x, y))


def test_ridge_tends_to_least_squares_and_solves_its_normal_equations():
    x, y = drawn(3, 7)
    w = Ridge(0.5).weights(x, y)
    gradient = torch.einsum("tpd,tp->td", x, torch.einsum("tpd,td->tp", x, w) - y) + 0.5 * w
    assert gradient.abs().max() < 1e-12
    torch.testing.assert_close(Ridge(1e-9).weights(x, y), LeastSquares().weights(x, y), atol=1e-8, rtol=1e-8)


def test_least_squares_on_fewer_points_than_dimensions_fits_them_with_the_smallest_norm():
    x, y = drawn(5, 3)
    w = LeastSquares().weights(x, y)
    torch.testing.assert_close(torch.einsum("tpd,td->tp", x, w), y)
    orthogonal = w - torch.einsum("tpd,tp->td", x, torch.linalg.solve(x @ x.mT, torch.einsum("tpd,td->tp", x, w)))
    assert orthogonal.abs().max() < 1e-10


def test_the_published_numbers_of_one_step():
    """d = k = 10, uniform: E tr S = 10/12, rate 6.0606, half the error 0.20623, and 0.41667 without a step."""
    at_ten = best_step(uniform_moments(10), 10)
    assert at_ten.rate == pytest.approx(6.0606, abs=5e-5)
    assert at_ten.error / 2 == pytest.approx(0.20623, abs=5e-6)
    assert at_ten.zero / 2 == pytest.approx(0.41667, abs=5e-6)
    assert at_ten.mean_excess == pytest.approx(0, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 12), k=st.integers(1, 60))
def test_one_step_on_normal_inputs(d, k):
    found = best_step(normal_moments(identity(d)), k)
    assert found.rate == pytest.approx(k / (k + d + 1)) and found.error == pytest.approx(d * (d + 1) / (k + d + 1))
    data = hl.data.in_context_regression(d=d, n_points=k, inputs="normal")
    assert expected_error(Averaging(), data).value == pytest.approx(d * (d + 1) / k)
    assert expected_error(LeastSquares(), data).value == max(d - k, 0)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=5, unique=True),
    mean=st.booleans(),
    noise=st.floats(0, 1),
    shift=st.floats(-0.2, 0.2),
)
def test_no_other_shared_step_is_better(lengths, mean, noise, shift):
    data = hl.data.in_context_regression(d=4, noise=noise)
    found = best_step(moments_of(data), lengths, noise=noise, mean=mean)
    other = GradientDescent(found.rate * (1 + shift), mean)
    error = sum(expected_error(other, data, n_points=k).value for k in lengths) / len(lengths)
    assert error >= found.error - 1e-12
    for k, expected, best in zip(lengths, found.errors.tolist(), found.own_errors.tolist(), strict=True):
        assert expected_error(found.learner(), data, n_points=k).value == pytest.approx(expected)
        assert expected_error(found.own_learner(k), data, n_points=k).value == pytest.approx(best)
        assert best <= expected + 1e-12


def test_sharing_a_step_over_5_to_50_examples_costs_11_to_18_percent_on_normal_inputs():
    normal, uniform = normal_moments(identity(10)), uniform_moments(10)
    excess = [best_step(m, range(5, 51), mean=mean).mean_excess for m in (normal, uniform) for mean in (True, False)]
    assert [round(100 * e) for e in excess] == [11, 18, 11, 21]


def test_the_preconditioner_of_normal_inputs_is_the_published_one():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    covariance, k, noise = root @ root.T, 7, 0.5
    gamma = (1 + 1 / k) * covariance + covariance.trace() / k * identity(4)
    found = best_preconditioner(normal_moments(covariance), k)
    torch.testing.assert_close(found.matrix, torch.linalg.inv(gamma))
    noisy = best_preconditioner(normal_moments(covariance), k, noise=noise)
    torch.testing.assert_close(noisy.matrix, torch.linalg.inv(gamma + noise**2 / k * identity(4)))
    # Ahn et al. write it with eigenvalues: 1 / ((k + 1) / k lambda_i + sum lambda / k)
    values = torch.linalg.eigvalsh(covariance)
    published = 1 / ((k + 1) / k * values + values.sum() / k)
    torch.testing.assert_close(torch.linalg.eigvalsh(found.matrix).flip(0), published)


@pytest.mark.parametrize("mean", [True, False])
def test_with_equal_variances_the_preconditioner_is_the_rate(mean):
    for moments in (uniform_moments(3), normal_moments(2 * identity(3))):
        rate = best_step(moments, [4, 9], noise=0.1, mean=mean).rate
        found = best_preconditioner(moments, [4, 9], noise=0.1, mean=mean)
        torch.testing.assert_close(found.matrix, rate * identity(3))


def test_preconditioning_helps_where_variances_differ():
    """By simulation: its error is the closed form tr Sigma - tr(Sigma^2 Gamma^-1), below that of the best rate."""
    covariance, k = torch.diag(torch.tensor([4.0, 1.0, 0.1], dtype=torch.float64)), 6
    moments = normal_moments(covariance)
    x, _ = drawn(3, k + 1, tasks=60_000)
    x = x * covariance.diagonal().sqrt()
    w, _ = drawn(3, 1, seed=1, tasks=60_000)
    y = (x * w).sum(-1)
    errors = {}
    for name, learner in (("P", best_preconditioner(moments, k)), ("rate", best_step(moments, k).learner())):
        guess = (learner.weights(x[:, :-1], y[:, :-1]) * x[:, -1]).sum(-1)
        errors[name] = (guess - y[:, -1]).square()
    gamma = (1 + 1 / k) * covariance + covariance.trace() / k * identity(3)
    exact = float(covariance.trace() - (covariance @ covariance @ torch.linalg.inv(gamma)).trace())
    standard_error = float(errors["P"].std()) / math.sqrt(len(x))
    assert abs(float(errors["P"].mean()) - exact) < 4 * standard_error
    rate_error = float(errors["rate"].mean())
    assert abs(rate_error - best_step(moments, k).error) < 4 * float(errors["rate"].std()) / math.sqrt(len(x))
    assert rate_error > exact


@pytest.mark.parametrize(
    ("inputs", "noise", "d", "k"), [("normal", 0.3, 3, 9), ("uniform", 0.05, 6, 2), ("uniform", 0.0, 3, 5)]
)
def test_expected_errors_are_those_of_simulated_prompts(inputs, noise, d, k):
    data = hl.data.in_context_regression(d=d, n_points=k, inputs=inputs, noise=noise)
    prompts = draw_prompts(data, 20_000).to(DOUBLE)
    moments = moments_of(data)
    v = float(moments.covariance[0, 0])
    learners = [Zero(), Averaging(v), GradientDescent(0.4 / v), GradientDescent((0.5 / v, 0.3 / v)), Ridge(0.1 * v)]
    learners += [GDPlusPlus((0.4 / v, 0.3 / v), (0.1 / v, 0.0)), best_preconditioner(moments, k, noise=noise)]
    for learner in [*learners, LeastSquares()]:
        expected = expected_error(learner, data, draws=2000)
        errors = (learner.predict(prompts) - prompts.target).square()
        spread = math.hypot(float(errors.std()) / math.sqrt(len(errors)), expected.standard_error)
        assert abs(float(errors.mean()) - expected.value) < 4.5 * spread + 1e-12, learner.title


def test_noisy_least_squares_has_no_mean_near_as_many_points_as_dimensions():
    uniform = hl.data.in_context_regression(d=5, noise=0.5)
    assert [expected_error(LeastSquares(), uniform, n_points=k).value for k in (4, 5, 6)] == [math.inf] * 3
    data = hl.data.in_context_regression(d=5, inputs="normal", noise=0.5)
    errors = [expected_error(LeastSquares(), data, n_points=k).value for k in (3, 4, 5, 6, 7)]
    assert errors[1:4] == [math.inf] * 3
    # bias (d - k) + s^2 min(k, d) / (|k - d| - 1) + s^2
    assert errors[0] == pytest.approx(2 + 0.25 * 3 + 0.25) and errors[4] == pytest.approx(0.25 * 5 + 0.25)


def test_ridge_with_the_noise_is_the_best_penalty():
    data = hl.data.in_context_regression(d=4, n_points=6, inputs="normal", noise=0.7)
    errors = [expected_error(Ridge(p), data, draws=3000).value for p in (0.25, 0.49, 0.8)]
    assert errors[1] < min(errors[0], errors[2])


def test_searched_steps_are_the_closed_form_at_depth_1_and_no_worse_at_each_further_one():
    data = hl.data.in_context_regression(d=3, n_points=8, inputs="normal")
    draws = {"draws": 1000}
    by_search, exact = best_constant_steps(data, 8, 1, **draws), best_step(moments_of(data), 8)
    assert by_search.rates[0] == pytest.approx(exact.rate, rel=0.03)
    constant = [best_constant_steps(data, 8, depth, **draws) for depth in (1, 2, 3)]
    for learners in (constant, best_step_schedules(data, 8, 3, **draws), best_gd_plus_plus(data, 8, 3, **draws)):
        errors = [expected_error(learner, data, **draws).value for learner in learners]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.8 * errors[0]


def test_depth_never_reaches_least_squares_on_noiseless_data():
    gap = measure_depth_gap(hl.data.in_context_regression(d=3, n_points=5), (1, 3), draws=500)
    assert gap.least_squares == 0 and gap.zero == pytest.approx(0.25)
    assert 0 < gap.plus_plus[1] < gap.schedule[1] <= gap.constant[1] < gap.constant[0]
    assert "least squares 0" in gap.sentence and len(gap.table()) == 2 and gap.figure().data


def test_searched_steps_do_not_diverge_on_data_sets_with_larger_eigenvalues_than_the_drawn_ones():
    """Three steps of GD++ had an error of 1.8 with a standard error of 1.8, and two steps 0.37."""
    data = hl.data.in_context_regression(d=4, n_points=8, inputs="normal")
    spectra = draw_spectra(data, 8, draws=500, seed=0)
    beyond = 1.1 * spectra[spectra.amax(1).argmax()][None]
    for learner in (best_gd_plus_plus(data, 8, 3, draws=500)[-1], best_step_schedules(data, 8, 5, draws=500)[-1]):
        assert float(spectral_errors(learner.gain(beyond, 8), beyond, data, 8)) < 4  # that of the answer 0
    assert len(with_larger(spectra)) == 501 and float(with_larger(spectra).max()) == pytest.approx(
        1.15 * float(spectra.max())
    )
    # GD++ of six steps had a mean error of 576,455 on prompts of 5 examples, where the answer 0 has 10
    further = 1.25 * spectra[spectra.amax(1).argmax()][None]
    learner = best_gd_plus_plus(data, 8, 6, draws=500, larger=(1.15, 1.3))[-1]
    assert float(spectral_errors(learner.gain(further, 8), further, data, 8)) < 4


def test_one_matrix_is_a_rate_only_for_coordinates_that_are_independent():
    independent = independent_moments(3, 0.5, 0.9)
    rate = best_step(independent, [3, 6], noise=0.4, mean=False).rate
    found = best_preconditioner(independent, [3, 6], noise=0.4, mean=False).matrix
    torch.testing.assert_close(found, rate * identity(3))
    correlated = normal_moments(torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
    assert best_preconditioner(correlated, 5).matrix[0, 1] < -0.5


def test_prompts_are_the_tokens_that_the_task_shows():
    for interleaved in (False, True):
        data = hl.data.in_context_regression(d=3, n_points=4, interleaved=interleaved)
        batch = data.batch(0, 5)
        prompts = prompts_of(batch)
        assert prompts.interleaved is interleaved and prompts.points.shape == (5, 4, 3)
        assert torch.equal(prompts.tokens(), batch.inputs) and torch.equal(prompts.target, batch.targets[:, -1, 0])


def test_prompts_of_a_task_with_several_lengths_are_of_the_one_asked_for():
    data = replace(hl.data.in_context_regression(d=2), n_points=(3, 7))
    assert draw_prompts(data, 4, n_points=5).n_points == 5
    assert expected_error(LeastSquares(), data, n_points=1).value == pytest.approx(1 / 12)
    for asks in (lambda: draw_prompts(data, 4), lambda: expected_error(Zero(), data)):
        with refused(HooklensError, "3 to 7 examples; say how many with n_points="):
            asks()
    summed = [GradientDescent((1.0, 1.0), mean=False), GDPlusPlus(1.0, 0.0, mean=False)]
    assert [learner.title for learner in summed] == ["2 steps of gradient descent, summed", "GD++, 1 step, summed"]


def test_bad_input_says_what_would_work():
    with refused(HooklensError, "as many gammas as rates, got 1 and 2"):
        GDPlusPlus((1.0, 1.0), (1.0,))
    with refused(HooklensError, r"use LeastSquares\(\)"):
        Ridge(0.0)
    with refused(HooklensError, "2 lengths need as many probabilities"):
        best_step(uniform_moments(2), [1, 2], probabilities=[1.0])
    with refused(HooklensError, "symmetric"):
        normal_moments(torch.ones(2, 3))
    with refused(HooklensError, "is not a function of S"):
        PreconditionedStep(identity(2)).gain(torch.ones(2), 3)
    with refused(HooklensError, r"points of shape \[1, 2, 3\]"):
        x, y = drawn(3, 2, tasks=1)
        RegressionPrompts(x, y, x[:, 0, :2], y[:, 0])
    with refused(HooklensError, "not among the lengths"):
        best_step(uniform_moments(2), [3, 4]).own_learner(5)


def test_the_moments_of_a_sample_are_those_of_its_distribution():
    x, _ = drawn(2, 200_000, tasks=1)
    x = x[0] * torch.tensor([1.0, 2.0])
    estimate = InputMoments(x.T @ x / len(x), torch.einsum("n,ni,nj->ij", x.square().sum(1), x, x) / len(x))
    exact = normal_moments(torch.diag(torch.tensor([1.0, 4.0])))
    torch.testing.assert_close(estimate.fourth, exact.fourth, rtol=0.03, atol=0.3)
    u = torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    fourth = torch.einsum("n,ni,nj->ij", u.square().sum(1), u, u) / len(u)
    torch.testing.assert_close(fourth, uniform_moments(2).fourth, rtol=0.02, atol=3e-4)


REGRESSION = hl.data.in_context_regression(d=2, n_points=3)
READER = hl.HookedTransformer(
    hl.HookedTransformerConfig(
        **{"n_layers": 1, "d_model": 4, "n_heads": 1, "d_head": 4, "d_mlp": 4, "n_ctx": 4},
        **{"embed": {"part": "vectors", "d_in": 3}, "d_vocab": 2, "d_vocab_out": 1},
    )
)


@pytest.mark.parametrize("learner", [best_step(moments_of(REGRESSION), 3), "ols", None], ids=["result", "text", "None"])
def test_a_learner_that_is_none_failed_inside_its_first_use(learner):
    prompts = hl.icl.draw_prompts(REGRESSION, 2)
    for ask in (
        lambda: hl.icl.compare_learners(READER, prompts, learner),
        lambda: hl.icl.measure_shifts(READER, REGRESSION, [learner]),
        lambda: expected_error(learner, REGRESSION),
    ):
        with refused(HooklensError, "such as LeastSquares"):
            ask()


@pytest.mark.parametrize("data", [hl.data.modular_arithmetic(5), None], ids=["modular", "None"])
def test_data_of_another_task_failed_at_a_missing_attribute(data):
    for ask in (
        lambda: moments_of(data),
        lambda: hl.icl.draw_prompts(data, 2),
        lambda: expected_error(LeastSquares(), data),
        lambda: hl.icl.measure_shifts(READER, data, [LeastSquares()]),
    ):
        with refused(HooklensError, "in_context_regression"):
            ask()


def test_prompts_that_are_none_failed_at_a_missing_attribute():
    with refused(HooklensError, "draw_prompts"):
        hl.icl.predict(READER, None)


def test_inputs_with_a_negative_variance_had_moments():
    with refused(HooklensError, "no negative eigenvalue"):
        normal_moments(-torch.eye(2, dtype=torch.float64))


def test_vectors_in_float32_failed_in_a_model_in_float64():
    inputs = REGRESSION.batch(0, 2).inputs
    wide = hl.HookedTransformer(READER.cfg).double()
    assert hl.icl.measure_rank_collapse(wide, inputs).share.dtype == torch.float64
    assert (hl.icl.compare_with_kernel(wide, inputs).with_norms < 1e-5).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Averaging(0.0), "variance of the inputs, which is above 0"),
        (lambda: Averaging(math.nan), "variance is a finite number"),
        (lambda: GradientDescent((0.1,), mean="no"), "mean is True or False"),
        (lambda: GDPlusPlus(0.1, 0.1, mean=1), "mean is True or False"),
        (lambda: PreconditionedStep(torch.eye(3)[:2]), r"is a tensor \[d d\]; got \[2, 3\]"),
        (lambda: PreconditionedStep(torch.eye(3)).weights(torch.ones(1, 4, 2), torch.ones(1, 4)), "these have 2"),
    ],
)
def test_learners_that_cannot_answer_are_refused(make, says):
    with refused(HooklensError, says):
        make()


def test_inputs_that_do_not_vary_had_a_rate_of_nan():
    with refused(HooklensError, "variance of 0"):
        independent_moments(3, 0.0, 0.0)
    with refused(HooklensError, "at least the square of the variance, 4; got 3"):
        independent_moments(3, 2.0, 3.0)
    assert float(best_step(independent_moments(3, 2.0, 4.0), 5).rate) > 0  # coordinates of plus or minus one size
    flat = normal_moments(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)))
    with refused(HooklensError, "fewer dimensions than they have coordinates"):
        best_preconditioner(flat, 5)


def test_other_objects_in_the_place_of_moments_and_prompts():
    for best in (best_step, best_preconditioner):
        with refused(HooklensError, "moments_of"):
            best(hl.data.in_context_regression(d=2), 5)
    with refused(HooklensError, r"\[task point d\], one task with points\[None\]; got \[4, 2\]"):
        RegressionPrompts(torch.zeros(4, 2), torch.zeros(4), torch.zeros(2), torch.zeros(()))
    with refused(HooklensError, "in_context_regression"):
        prompts_of(3)


def test_moments_that_no_inputs_have_gave_negative_errors():
    e = identity(3)
    for fourth in (0.1 * e, 0 * e):
        with refused(HooklensError, "no inputs have these moments"):
            InputMoments(e, fourth)
    with refused(HooklensError, "negative eigenvalue"):
        InputMoments(torch.diag(torch.tensor([3.0, -1.0])), 9 * identity(2))
    with refused(HooklensError, "symmetric"):
        InputMoments(torch.tensor([[1.0, 5.0], [0.0, 1.0]]), 99 * identity(2))
    with refused(HooklensError, "real numbers, got"):
        InputMoments(None, None)
    assert independent_moments(3, 0.1, 0.01).d == 3  # 0.1**2 is above 0.01 in floating point
    narrow = InputMoments(e.float(), 5 * e.float())
    assert best_step(narrow, 5).rate == best_step(InputMoments(e, 5 * e), 5).rate
    with refused(HooklensError, "mean is True or False"):
        best_step(narrow, 5, mean=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_prompts_with_numbers_that_are_not_finite_failed_inside_a_learner(bad):
    x, y = drawn(3, 4, tasks=2)
    with refused(HooklensError, "not finite"):
        RegressionPrompts(x, y, x[:, 0] * bad, y[:, 0])
    with refused(HooklensError, "real numbers with a point"):
        RegressionPrompts(x.long(), y, x[:, 0], y[:, 0])
    with refused(HooklensError, "at least one example"):
        RegressionPrompts(x[:, :0], y[:, :0], x[:, 0], y[:, 0])
    with refused(HooklensError, "finite numbers with a point"):
        PreconditionedStep(identity(3) * bad)


def test_prompts_print_their_sizes():
    prompts = draw_prompts(hl.data.in_context_regression(d=2, n_points=3), 5)
    assert repr(prompts) == "RegressionPrompts(5 prompts of 3 examples in 2 dimensions, a token for each example)"


def test_moments_and_matrices_stay_as_they_were_given():
    matrix = identity(2)
    moments, step = normal_moments(matrix), PreconditionedStep(matrix)
    matrix[0, 0] = 9
    assert float(moments.covariance[0, 0]) == float(step.matrix[0, 0]) == 1


@pytest.mark.parametrize("best", [best_step, best_preconditioner])
@pytest.mark.parametrize("noise", [-1, True, "a"])
def test_noise_is_a_number_of_at_least_0(best, noise):
    with refused(HooklensError, "noise is a finite number of at least 0"):
        best(uniform_moments(2), 3, noise=noise)


def test_larger_eigenvalues_are_larger():
    for bad in (-3.0, (0.5,)):
        with refused(HooklensError, "larger is a finite number of at least 1"):
            best_gd_plus_plus(REGRESSION, 3, 1, draws=9, larger=bad)


def test_numbers_may_stand_alone_or_in_tensors():
    assert GradientDescent(torch.tensor(1.0)) == GradientDescent(torch.tensor([1.0])) == GradientDescent(1.0)
    assert best_step(uniform_moments(2), 3, probabilities=1.0).rate == best_step(uniform_moments(2), 3).rate
    with refused(HooklensError, "such as LeastSquares.*got list"):
        expected_error([LeastSquares()], REGRESSION)


def test_a_shared_step_is_nowhere_better_than_the_best_one():
    steps = [best_step(uniform_moments(d), k) for d in range(1, 6) for k in range(1, 20)]
    assert min(min(float(step.excess.min()), step.mean_excess) for step in steps) == 0


def test_without_noise_there_is_no_ridge():
    gap = measure_depth_gap(REGRESSION, (1,), draws=20)
    assert gap.ridge is None and "ridge" not in gap.headline() + gap.sentence


@pytest.mark.parametrize("learner", [LeastSquares(), Ridge(0.5)], ids=["least squares", "ridge"])
def test_learners_that_solve_also_do_in_16_bits(learner):
    x, y = (part.half() for part in drawn(3, 6))
    w = learner.weights(x, y)
    assert w.dtype == torch.float16
    torch.testing.assert_close(w.double(), learner.weights(x.double(), y.double()), atol=1e-2, rtol=1e-2)


LEARNERS = [
    Zero(),
    Averaging(),
    LeastSquares(),
    Ridge(0.5),
    GradientDescent(1.0),
    GDPlusPlus(1.0, 1.0),
    PreconditionedStep(identity(3)),
]


@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: learner.title)
def test_examples_that_do_not_fit_failed_inside_torch(learner):
    x, y = drawn(3, 4)
    for points, answers, says in (
        (x, y[:, :2], r"need answers \[4, 4\]; got \[4, 2\]"),
        (x.tolist(), y, "points are a tensor"),
        (x, y.float(), "one dtype, got points torch.float64, answers torch.float32"),
        (x * math.nan, y, "not finite"),
        (x[:0], y[:0], r"at least one task.* got \[0, 4, 3\]"),
    ):
        with refused(HooklensError, says):
            learner.weights(points, answers)
    with refused(HooklensError, "draw_prompts"):
        learner.predict(x)


def test_prompts_of_no_task_failed_in_the_comparison():
    none = torch.zeros(0, 3)
    with refused(HooklensError, "at least one task"):
        RegressionPrompts(torch.zeros(0, 4, 3), torch.zeros(0, 4), none, none[:, 0])
