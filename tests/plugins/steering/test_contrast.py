"""Contrast directions: known separations, the folds done by hand, and labels that mean nothing."""

import math

import pytest
import torch
from model.zoo import zoo_model

from hooklens.core.errors import InputError
from hooklens.plugins.steering.contrast import find_direction
from hooklens.plugins.steering.held_out_steering import cross_fit, make_splits
from hooklens.testing import tiny_model


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(n=12, length=4, ends=(1, 2), seed=0):
    start = torch.randint(3, 11, (n, length), generator=torch.Generator().manual_seed(seed))
    return [torch.cat([start, torch.full((n, 1), end)], 1) for end in ends]


def test_the_direction_where_prompts_enter_is_the_difference_of_their_embeddings():
    model = zoo_model("gpt2", dtype=torch.float64)
    found = find_direction(model, *pairs(), site="resid_pre", draws=99)
    torch.testing.assert_close(found.at(0), (model.W_E[1] - model.W_E[2]).detach(), atol=1e-12, rtol=1e-12)
    assert found.separation[0] == 1 and found.gap[0].item() == pytest.approx(1, abs=1e-9)
    assert found.p[0] == pytest.approx(1 / 100) and found.best == 0 and found.best_p == pytest.approx(1 / 100)


def test_the_mean_over_positions_and_a_position_are_the_activations_means():
    model, (a, b) = zoo_model("llama", dtype=torch.float64), pairs()
    acts = [model.run_with_cache(rows, names="mlp_out")[1]["mlp_out", 1] for rows in (a, b)]
    for pos, read in ((None, lambda x: x.mean(1)), (2, lambda x: x[:, 2]), (-1, lambda x: x[:, -1])):
        found = find_direction(model, a, b, site="mlp_out", pos=pos, draws=9)
        expected = read(acts[0]).mean(0) - read(acts[1]).mean(0)
        torch.testing.assert_close(found.at(1), expected, atol=1e-10, rtol=1e-10)


def test_prompts_of_different_lengths_are_read_where_they_end():
    model = zoo_model("gpt2", dtype=torch.float64)
    a, b = [[5, 1], [4, 6, 1], [7, 1]], [[5, 2], [4, 6, 2], [7, 2]]
    found = find_direction(model, a, b, site="resid_pre", draws=9)
    torch.testing.assert_close(found.at(0), (model.W_E[1] - model.W_E[2]).detach(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("counts", [(9, 9), (7, 11)])
def test_held_out_scores_are_those_of_means_taken_by_hand(counts):
    acts, split = normal(3, sum(counts), 6) + 5, make_splits(*counts, None, 3)
    found, positive = cross_fit(acts, split, 8, 0, keep=3), split.labels() > 0
    assert split.paired == (counts[0] == counts[1])
    for layer, x in enumerate(acts):
        for fold in split.folds:
            above, below = x[positive & ~fold].mean(0), x[~positive & ~fold].mean(0)
            along = above - below
            by_hand = (x[fold] - (above + below) / 2) @ along / along.square().sum()
            torch.testing.assert_close(found.score[layer, fold], by_hand, atol=1e-10, rtol=1e-10)
    signs = split.shuffled(8, torch.Generator().manual_seed(1))
    for k in range(3):
        expected = acts[:, signs[k] > 0].mean(1) - acts[:, signs[k] < 0].mean(1)
        torch.testing.assert_close(found.shuffled[k], expected, atol=1e-10, rtol=1e-10)


def test_two_gaussians_are_separated_as_well_as_can_be():
    """Two normal clouds d' apart along one axis: the chance of the right order is Phi(d' / sqrt 2)."""
    n, d = 4000, 2.0
    acts = normal(1, 2 * n, 3)
    acts[:, :n, 0] += d
    found = cross_fit(acts, make_splits(n, n, None, 0), 2, 0, keep=1)
    assert found.separation.item() == pytest.approx(0.5 * (1 + math.erf(d / 2)), abs=0.012)


def test_labels_that_mean_nothing_are_called_so():
    """Over many data sets without a difference, p is uniform: a tenth lies below 0.1."""
    p = []
    for seed in range(60):
        found = cross_fit(normal(1, 20, 5, seed=seed), make_splits(10, 10, None, seed), 39, seed, keep=1)
        p.append(float(((found.null >= found.separation).sum() + 1) / 40))
    p = torch.tensor(p)
    assert 0.0 <= (p <= 0.1).double().mean() <= 0.2 and 0.35 < p.mean() < 0.65


def test_the_choice_of_the_best_layer_is_counted_in():
    acts = normal(40, 16, 5)
    found = find_direction(zoo_model("gpt2"), *pairs(), draws=19)
    assert found.best_p >= found.p.min()
    null = cross_fit(acts, make_splits(8, 8, None, 0), 99, 0, keep=1)
    best, each = null.separation.max(), null.null
    of_best = float(((each.max(1).values >= best).sum() + 1) / 100)
    of_layer = float(((each[:, null.separation.argmax()] >= best).sum() + 1) / 100)
    assert of_layer < 0.1 < of_best


def test_groups_stay_in_one_fold_and_swap_together():
    split = make_splits(8, 8, torch.arange(4).repeat_interleave(2), 0)
    for fold in split.folds:
        for one in range(4):
            assert len(fold[split.group == one].unique()) == 1
    drawn = split.shuffled(50, torch.Generator().manual_seed(0)) * split.labels()
    assert all(len(drawn[k, split.group == one].unique()) == 1 for k in range(50) for one in range(4))
    assert 0.3 < (drawn > 0).double().mean() < 0.7


def test_what_cannot_be_contrasted_is_refused_with_a_reason():
    model = tiny_model()
    with pytest.raises(InputError, match="one vector per position"):
        find_direction(model, [[1], [2]], [[3], [4]], site="z")
    with pytest.raises(InputError, match="position 1 is out of range for prompt 0, which has 1 tokens"):
        find_direction(model, [[1], [2, 3]], [[3], [4]], pos=1)
    with pytest.raises(InputError, match="make no pairs"):
        find_direction(model, [[1], [2]], [[3], [4], [5]], group=torch.arange(2))
    with pytest.raises(InputError, match="at least two independent"):
        find_direction(model, [[1]], [[3]])
    with pytest.raises(InputError, match="positive is empty"):
        find_direction(model, [], [[3]])
    with pytest.raises(InputError, match="at least 1"):
        find_direction(model, [[1], [2]], [[3], [4]], draws=0)


def test_directions_of_half_precision_models_are_not_rounded_differences_of_rounded_means():
    rows = [[[i, token] for i in range(10)] for token in (1, 2)]
    half = find_direction(tiny_model().to(torch.bfloat16), *rows, draws=9)
    model = tiny_model().to(torch.bfloat16)
    acts = [model.run_with_cache(some, names=["resid_post"])[1]["resid_post", 1][:, -1].double() for some in rows]
    expected = acts[0].mean(0) - acts[1].mean(0)
    assert half.direction.dtype == torch.float32
    torch.testing.assert_close(half.direction[1].double(), expected.detach(), atol=1e-6, rtol=1e-6)
