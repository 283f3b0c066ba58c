"""Products of weights are the model; interpolation and shifted prompts on models with planted weights."""

import pytest
import torch
from refused import refused

import hooklens as hl
from hooklens.core.errors import HooklensError
from hooklens.model.config import Biases, LinearScore, VectorEmbed
from hooklens.plugins.algorithmic.icl.constructions import construct_descent
from hooklens.plugins.algorithmic.icl.learners import GradientDescent, LeastSquares, PreconditionedStep, Ridge, Zero
from hooklens.plugins.algorithmic.icl.regression_prompts import draw_prompts, predict
from hooklens.plugins.algorithmic.icl.shifted_prompts import measure_shifts
from hooklens.plugins.algorithmic.icl.weight_interpolation import interpolate_weights, weight_products
from hooklens.testing import check_plugin, tiny_model
from hooklens.training.training_settings import Settings

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
DOUBLE = torch.zeros((), dtype=torch.float64)


def linear_model(**changes):
    """One head of linear attention with random weights; a wide stream, so that embedding and head have a basis."""
    parts = {
        "n_layers": 1,
        "n_heads": 1,
        "d_head": 5,
        "embed": VectorEmbed(d_in=4),
        "d_vocab_out": 1,
        "attn_only": True,
        "normalization_type": None,
        "positional_embedding_type": "none",
        "score_fn": LinearScore(),
        "biases": Biases(qkv=False, o=False, mlp=False),
        "dtype": torch.float64,
    }
    return tiny_model(**parts | changes)


def prompts_for(d=3, k=6, tasks=200):
    return draw_prompts(hl.data.in_context_regression(d=d, n_points=k), tasks).to(DOUBLE)


@pytest.mark.parametrize("mask", ["causal", "none"])
def test_products_of_weights_are_the_whole_function(mask):
    model, prompts = linear_model(mask=mask, score_fn=LinearScore(scale=1.7)), prompts_for()
    products = weight_products(model)
    for same in (products, products.rescaled()):
        torch.testing.assert_close(same.answers(prompts.tokens()), predict(model, prompts).detach())
    assert products.rescaled().scores.diagonal()[:-1].mean() == pytest.approx(1)


def test_products_of_the_construction_are_those_of_proposition_1():
    products = weight_products(construct_descent(GradientDescent(6.0), 2, 3, dtype=torch.float64))
    torch.testing.assert_close(products.scores, torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)))
    torch.testing.assert_close(products.values, torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64))


def test_the_same_function_in_another_scale_and_basis_has_no_barrier():
    """The construction with its head's basis turned and a scale moved from scores to values."""
    step, prompts = GradientDescent(5.0), prompts_for()
    model = construct_descent(step, 3, 6, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    with torch.no_grad():
        attn = model.blocks[0].attn
        attn.W_Q[0] = attn.W_Q[0] @ turn * -3
        attn.W_K[0] = attn.W_K[0] @ turn
        attn.W_V[0] = attn.W_V[0] @ turn / -3
        attn.W_O[0] = turn.T @ attn.W_O[0]
    found = interpolate_weights(model, prompts, step)
    torch.testing.assert_close(found.errors, found.errors[:1].expand(11))
    assert found.barrier == pytest.approx(0, abs=1e-12) and found.midpoint == pytest.approx(float(found.errors[0]))
    assert found.scores_cosine == pytest.approx(1) and found.values_cosine == pytest.approx(1)


def test_ends_are_the_errors_of_the_model_and_of_the_learner():
    prompts = prompts_for()
    matrix = torch.diag(torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64))
    for learner in (GradientDescent(5.0), PreconditionedStep(matrix)):
        model = linear_model()
        found = interpolate_weights(model, prompts, learner)
        answers = torch.stack([predict(model, prompts).detach(), learner.predict(prompts)])
        torch.testing.assert_close(found.errors[[0, -1]], (answers - prompts.target).square().mean(1))
        assert len(found.table()) == 11 and len(found.figure().data) == 3


def test_the_path_between_random_and_constructed_weights_is_not_straight():
    found = interpolate_weights(linear_model(), prompts_for(), GradientDescent(5.0), alphas=(0.0, 0.5, 1.0))
    assert abs(found.barrier) > 1e-3 and abs(found.scores_cosine) < 0.9


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"n_layers": 2}, "2 layers"),
        ({"n_heads": 2}, "2 heads"),
        ({"score_fn": "softmax"}, "the scores Softmax"),
        ({"attn_only": False}, "an MLP"),
        ({"biases": Biases()}, "biases"),
        ({"positional_embedding_type": "learned"}, "positions"),
        ({"normalization_type": "LN"}, "norms"),
    ],
)
def test_models_that_are_more_than_products_are_refused(changes, problem):
    with refused(HooklensError, f"this model has .*{problem}"):
        interpolate_weights(linear_model(**changes), prompts_for(), GradientDescent(1.0))


def test_the_construction_errs_as_its_learner_on_every_shift():
    data, step = hl.data.in_context_regression(d=3, n_points=6, noise=0.1), GradientDescent(0.8, mean=False)
    model = construct_descent(step, 3, 6, dtype=torch.float64, n_ctx=21)
    others = [step, LeastSquares(), Ridge(0.01), Zero()]
    found = measure_shifts(model, data, others, scales=(0.5, 1.0, 3.0), lengths=(2, 20), dims=(1, 3, 7), tasks=300)
    torch.testing.assert_close(found.model_errors, found.learner_errors[0])
    torch.testing.assert_close(found.learner_errors[3], torch.ones(8, dtype=torch.float64))
    assert found.notes[1] == "as in training"
    assert found.notes[3:5] == ["shorter than training", "longer than training"]
    rest = " of 3 coordinates, the rest 0"
    assert found.notes[5:] == [f"1{rest}", f"3{rest}", "the first 3 of 7 coordinates"]
    # no answer is better than what is left by the noise and by the hidden coordinates, up to sampling
    assert (found.learner_errors[2] > 0.7 * found.unavoidable).all()
    assert found.unavoidable[7] > 0.4 > found.unavoidable[6]  # (4/12 + 0.01) / (7/12 + 0.01)
    assert found.unavoidable[7] == pytest.approx((4 / 12 + 0.01) / float(found.zero[7]))
    assert len(found.table()) == 8 and found.figure().data


def test_a_shift_changes_what_it_names_alone():
    data = hl.data.in_context_regression(d=2, n_points=4)
    model = construct_descent(GradientDescent(2.0), 2, 4, dtype=torch.float64)
    others = [LeastSquares(), GradientDescent(32.0)]
    found = measure_shifts(model, data, others, scales=(1.0, 4.0), dims=(2,), tasks=50)
    assert found.zero[1] == pytest.approx(16 * float(found.zero[0])) and found.zero[2] == found.zero[0]
    assert found.learner_errors[0].max() < 1e-6
    # with 4 x for x, a rate acts as 16 times that rate
    torch.testing.assert_close(found.model_errors[1], found.learner_errors[1, 0])


def test_longer_prompts_on_learned_positions_say_that_these_are_untrained():
    model = tiny_model(embed=VectorEmbed(d_in=3), d_vocab_out=1)
    data = hl.data.in_context_regression(d=2, n_points=4)
    found = measure_shifts(model, data, [Zero()], scales=(), lengths=(3, 9), tasks=4)
    assert "positions without training" not in found.notes[0] and "positions without training" in found.notes[1]
    with refused(HooklensError, "n_ctx is 32"):
        measure_shifts(model, data, [Zero()], lengths=(40,))
    with refused(HooklensError, "at least one of scales, lengths and dims"):
        measure_shifts(model, data, [Zero()], scales=())


@pytest.mark.parametrize("plugin", ["interpolate_weights", "measure_shifts"])
def test_the_contract_on_models_that_read_vectors(plugin):
    check_plugin(plugin, models={str(dtype): linear_model(dtype=dtype) for dtype in DTYPES})


def test_one_scale_may_be_given_alone_and_zero_says_nothing():
    data, step = hl.data.in_context_regression(d=2, n_points=3), GradientDescent(1.0)
    model = construct_descent(step, 2, 3)
    alone = measure_shifts(model, data, step, scales=2.0, lengths=2, tasks=4)
    assert alone.shifts == ["scale 2", "2 examples"]
    with refused(HooklensError, "points times 0"):
        measure_shifts(model, data, step, scales=0.0)


def test_answers_that_are_not_finite_are_no_result():
    data, step = hl.data.in_context_regression(d=2, n_points=3), GradientDescent(1.0)
    model = construct_descent(step, 2, 3)
    with torch.no_grad():
        model.blocks[0].attn.W_V.fill_(torch.nan)
    with refused(HooklensError, "some answers of the model are not finite"):
        measure_shifts(model, data, step)


def test_the_task_of_a_run_is_that_it_was_trained_on(tmp_path):
    data = hl.data.in_context_regression(d=2, n_points=(2, 3), curriculum=4, seed=5)
    settings = Settings(batch=4, loss="squared_error")
    model = linear_model(embed=VectorEmbed(d_in=3), n_ctx=8)
    run = hl.train(model, data, steps=2, settings=settings, out=tmp_path / "run", show=False)
    assert hl.icl.task_of(tmp_path / "run").identity() == data.identity() == hl.icl.task_of(run).identity()


def test_the_construction_does_not_read_interleaved_prompts():
    prompts, step = draw_prompts(hl.data.in_context_regression(d=3, n_points=4, interleaved=True), 5), LeastSquares()
    with refused(HooklensError, "x and y in one token"):
        interpolate_weights(linear_model(), prompts, step)
