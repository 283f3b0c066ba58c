"""The hand-built transformer equals its learner, and the comparisons find the planted answers on it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refused import refused

import hooklens as hl
from hooklens.core.errors import HooklensError
from hooklens.model.config import Biases, LinearScore, VectorEmbed
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.icl.attention_regression import regress_attention
from hooklens.plugins.algorithmic.icl.best_steps import best_constant_steps
from hooklens.plugins.algorithmic.icl.constructions import FirstKeys, construct_descent
from hooklens.plugins.algorithmic.icl.expected_errors import expected_error
from hooklens.plugins.algorithmic.icl.learner_comparison import compare_learners, sensitivity_of
from hooklens.plugins.algorithmic.icl.learners import (
    GDPlusPlus,
    GradientDescent,
    LeastSquares,
    PreconditionedStep,
    Ridge,
    Zero,
)
from hooklens.plugins.algorithmic.icl.regression_prompts import draw_prompts, predict
from hooklens.testing import check_plugin, tiny_model

DOUBLE = torch.zeros((), dtype=torch.float64)
rates = st.lists(st.floats(-6, 6), min_size=1, max_size=3)


def regression_model(d=2, **changes):
    return tiny_model(**{"embed": VectorEmbed(d_in=d + 1), "d_vocab_out": 1} | changes)


@settings(max_examples=15, deadline=None)
@given(d=st.integers(1, 4), k=st.integers(1, 8), steps=rates, mean=st.booleans(), seed=st.integers(0, 99))
def test_the_construction_equals_gradient_descent_in_float64(d, k, steps, mean, seed):
    prompts = draw_prompts(hl.data.in_context_regression(d=d, n_points=k), 6, seed=seed).to(DOUBLE)
    eta, gamma = tuple(steps), tuple(r / 2 for r in steps)
    for learner in (GradientDescent(eta, mean), GDPlusPlus(eta, gamma, mean)):
        model = construct_descent(learner, d, k, dtype=torch.float64)
        expected = learner.predict(prompts)
        scale = float(expected.abs().amax()) + 1
        torch.testing.assert_close(predict(model, prompts), expected, atol=1e-11 * scale, rtol=1e-9)
        assert model.cfg.n_layers == len(steps)


def test_the_construction_equals_gradient_descent_to_1e_6_in_float32():
    prompts = draw_prompts(hl.data.in_context_regression(d=10, n_points=10), 200)
    double = prompts.to(DOUBLE)
    for learner in (GradientDescent(6.0606), GradientDescent((5.5,) * 6), GDPlusPlus((6.0, 8.0), (2.0, 0.0))):
        assert (predict(construct_descent(learner, 10, 10), prompts) - learner.predict(double)).abs().max() < 1e-6


def test_a_preconditioned_step_with_a_matrix_that_is_not_symmetric():
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prompts = draw_prompts(hl.data.in_context_regression(d=3, n_points=4), 9).to(DOUBLE)
    learner = PreconditionedStep(matrix)
    model = construct_descent(learner, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(predict(model, prompts), learner.predict(prompts), atol=1e-12, rtol=1e-10)


def test_the_division_of_scores_is_in_the_weights(monkeypatch):
    """Whatever the linear attention divides its scores by, the construction is exact."""
    from hooklens.plugins.algorithmic.icl import constructions

    made = constructions._blank
    monkeypatch.setattr(
        constructions,
        "_blank",
        lambda *sizes: blank_like(made(*sizes), score_fn=LinearScore(scale=7.0)),
    )
    learner = GradientDescent((3.0, 2.0))
    prompts = draw_prompts(hl.data.in_context_regression(d=2, n_points=5), 9).to(DOUBLE)
    model = construct_descent(learner, 2, 5, dtype=torch.float64)
    assert model.blocks[0].attn.scale == 7.0
    torch.testing.assert_close(predict(model, prompts), learner.predict(prompts), atol=1e-12, rtol=1e-10)


def blank_like(model, **changes):
    other = HookedTransformer(model.cfg.replace(**changes))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    return other


def test_a_single_summed_step_works_at_other_lengths_and_under_a_causal_mask():
    learner = GradientDescent(0.4, mean=False)
    model = construct_descent(learner, 2, 5, dtype=torch.float64, n_ctx=40)
    causal = HookedTransformer(model.cfg.replace(mask="causal"), dtype=torch.float64)
    causal.load_state_dict(model.state_dict())
    for k in (1, 5, 39):
        prompts = draw_prompts(hl.data.in_context_regression(d=2, n_points=k), 5).to(DOUBLE)
        for same in (model, causal):
            torch.testing.assert_close(predict(same, prompts), learner.predict(prompts), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("mask", ["causal", "none"])
def test_two_layers_are_two_steps_only_where_the_examples_see_each_other_alone(mask):
    learner = GradientDescent((4.0, 4.0))
    prompts = draw_prompts(hl.data.in_context_regression(d=2, n_points=5), 50).to(DOUBLE)
    model = construct_descent(learner, 2, 5, dtype=torch.float64)
    other = HookedTransformer(model.cfg.replace(mask=mask), dtype=torch.float64)
    other.load_state_dict(model.state_dict())
    assert (predict(other, prompts) - learner.predict(prompts)).abs().max() > 1e-3


def test_the_mask_goes_through_a_configuration_as_json():
    cfg = construct_descent(GradientDescent((1.0, 1.0)), 2, 5).cfg
    assert type(cfg).from_json(cfg.to_json()).mask == FirstKeys(5)


def test_what_no_layer_computes_is_refused():
    with refused(HooklensError, "a step of GradientDescent, GDPlusPlus or PreconditionedStep; got Ridge"):
        construct_descent(Ridge(1.0), 2, 5)


def test_the_comparison_names_the_learner_that_was_planted():
    planted, k = GradientDescent((5.0, 3.0)), 6
    prompts = draw_prompts(hl.data.in_context_regression(d=3, n_points=k), 80).to(DOUBLE)
    others = [GradientDescent(6.0), LeastSquares(), Zero(), planted]
    compared = compare_learners(construct_descent(planted, 3, k, dtype=torch.float64), prompts, others)
    assert compared.top(1).rows[0][0] == "2 steps of gradient descent"
    assert compared.difference[3] < 1e-12 and compared.share[3] < 1e-20 and compared.distance[3] < 1e-10
    torch.testing.assert_close(compared.cosine[3], DOUBLE + 1)
    torch.testing.assert_close(compared.correlation[3], DOUBLE + 1)
    torch.testing.assert_close(compared.slope[3], DOUBLE + 1)
    assert compared.cosine[2].isnan() and compared.error == pytest.approx(float(compared.learner_errors[3]))
    assert compared.zero == pytest.approx(float(compared.learner_errors[2])) and compared.figure().data


def test_half_the_rate_is_half_the_slope_at_the_same_cosine():
    prompts = draw_prompts(hl.data.in_context_regression(d=3, n_points=6), 20).to(DOUBLE)
    model = construct_descent(GradientDescent(2.0), 3, 6, dtype=torch.float64)
    compared = compare_learners(model, prompts, GradientDescent(4.0))
    assert compared.slope[0] == pytest.approx(0.5) and compared.cosine[0] == pytest.approx(1)
    assert compared.share[0] == pytest.approx(0.25)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_sensitivity_is_the_gradient_by_finite_differences(interleaved):
    model = regression_model(dtype=torch.float64)
    data = hl.data.in_context_regression(d=2, n_points=3, interleaved=interleaved)
    prompts = draw_prompts(data, 4).to(DOUBLE)
    answers, gradients = sensitivity_of(model, prompts)
    torch.testing.assert_close(answers, predict(model, prompts).detach())
    step = 1e-6
    for i in range(2):
        moved = prompts.query.clone()
        moved[:, i] += step
        change = (predict(model, replace(prompts, query=moved)) - answers).detach() / step
        torch.testing.assert_close(change, gradients[:, i], atol=1e-4, rtol=1e-4)


def test_scores_of_the_construction_are_inner_products():
    prompts = draw_prompts(hl.data.in_context_regression(d=3, n_points=6), 20).to(DOUBLE)
    model = construct_descent(GradientDescent(2.0), 3, 6, dtype=torch.float64)
    found = regress_attention(model, prompts)
    assert found.slope == pytest.approx(1) and found.intercept == pytest.approx(0, abs=1e-12)
    assert found.r2 == pytest.approx(1) and found.r2_within == pytest.approx(1) and found.random_r2 < 0.2
    torch.testing.assert_close(found.scores, found.products)
    assert len(found.figure().data) == 2


def test_the_regressed_scores_are_those_of_the_model():
    grouped = {"n_heads": 4, "n_key_value_heads": 2, "positional_embedding_type": "rotary"}
    for changes in ({}, grouped, {"qk_norm": "RMS"}, grouped | {"qk_norm": "RMS"}):
        model = regression_model(**changes)
        prompts = draw_prompts(hl.data.in_context_regression(d=2, n_points=4), 3)
        for layer, head in ((0, 1), (1, 0)):
            _, cache = model.run_with_cache(prompts.tokens(), names=["attn_scores"])
            found = regress_attention(model, prompts, layer=layer, head=head)
            torch.testing.assert_close(found.scores, cache["attn_scores", layer][:, head, -1, :-1].detach())


def test_a_term_of_the_query_alone_leaves_the_fit_within_prompts():
    """A key bias adds q . b to all scores of a prompt, which a softmax would not see."""
    built = construct_descent(GradientDescent(2.0), 3, 6, dtype=torch.float64)
    model = HookedTransformer(built.cfg.replace(biases=Biases(o=False, mlp=False)), dtype=torch.float64)
    model.load_state_dict(built.state_dict(), strict=False)
    with torch.no_grad():
        model.blocks[0].attn.q.bias.zero_()
        model.blocks[0].attn.k.bias.fill_(1.0)
    found = regress_attention(model, draw_prompts(hl.data.in_context_regression(d=3, n_points=6), 50))
    assert found.r2 < 0.6 and found.r2_within == pytest.approx(1)


def test_interleaved_keys_are_the_tokens_of_the_answers():
    model = regression_model()
    prompts = draw_prompts(hl.data.in_context_regression(d=2, n_points=4, interleaved=True), 3)
    _, cache = model.run_with_cache(prompts.tokens(), names=["attn_scores"])
    found = regress_attention(model, prompts)
    torch.testing.assert_close(found.scores, cache["attn_scores", 0][:, 0, -1, 1::2].detach())
    assert found.scores.shape == (3, 4)


def test_models_that_cannot_read_the_prompts_are_refused():
    prompts = draw_prompts(hl.data.in_context_regression(d=2, n_points=40), 3)
    with refused(HooklensError, "41 tokens, and the model's n_ctx is 32"):
        predict(regression_model(), prompts)
    with refused(HooklensError, r"VectorEmbed\(d_in=3\) and d_vocab_out=1; this one reads tokens"):
        predict(tiny_model(), prompts)
    short = draw_prompts(hl.data.in_context_regression(d=2, n_points=4), 3)
    with refused(HooklensError, "no head named 'L2H0'"):
        regress_attention(regression_model(), short, layer=2)
    with refused(HooklensError, "at least one learner"):
        compare_learners(regression_model(), short, [])


@pytest.mark.parametrize("plugin", ["compare_learners", "regress_attention"])
def test_the_contract_on_models_that_read_vectors(plugin):
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    check_plugin(plugin, models={str(dtype): regression_model(dtype=dtype) for dtype in dtypes})


def test_constructions_that_cannot_read_their_own_examples_are_refused():
    step, data = GradientDescent(1.0), hl.data.in_context_regression(d=2, n_points=5)
    with refused(HooklensError, "n_ctx is at least n_points and a query, 6 tokens; got 3"):
        construct_descent(step, 2, 5, n_ctx=3)
    wide = PreconditionedStep(torch.eye(3))
    for ask in (lambda: construct_descent(wide, 2, 5), lambda: expected_error(wide, data)):
        with refused(HooklensError, "points of 3 coordinates, and these have 2"):
            ask()
    for dtype in (torch.int32, torch.complex64, "float32"):
        with refused(HooklensError, "dtype is a floating-point"):
            construct_descent(step, 2, 5, dtype=dtype)


def test_gradients_in_inference_mode_failed_inside_torch():
    data, step = hl.data.in_context_regression(d=2, n_points=5), GradientDescent(1.0)
    model, prompts = construct_descent(step, 2, 5), draw_prompts(data, 3)
    with torch.inference_mode():
        for ask in (lambda: compare_learners(model, prompts, step), lambda: best_constant_steps(data, 5, 2, draws=9)):
            with refused(HooklensError, r"inference_mode\(\) rules out"):
                ask()
