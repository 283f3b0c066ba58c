"""Measures of sharing have known answers on built weights; sparse features come to share neurons, dense ones do not."""

import math

import pytest
import torch
from refused import refused

from hooklens.core.errors import HooklensError, InputError
from hooklens.scratch import feature_dimensions, features_per_neuron, train_superposition

DOUBLE = {"dtype": torch.float64}


def polygon(n):
    angle = 2 * math.pi * torch.arange(n, **DOUBLE) / n
    return torch.stack([angle.cos(), angle.sin()])


def turned(n, seed):
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), **DOUBLE))[0]


TETRAHEDRON = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], **DOUBLE)


@pytest.mark.parametrize("name, W, expected", [
    ("a dimension each", torch.eye(3, **DOUBLE), 1.0),
    ("any orthogonal directions", turned(4, seed=0), 1.0),
    ("antipodal pair", torch.tensor([[1.0, -1.0]], **DOUBLE), 1 / 2),
    ("triangle", polygon(3), 2 / 3),
    ("two antipodal pairs", polygon(4), 1 / 2),
    ("pentagon", 1.7 * polygon(5), 2 / 5),
    ("tetrahedron", TETRAHEDRON, 3 / 4),
    ("seven in a plane", polygon(7), 2 / 7),
])  # fmt: skip
def test_the_share_of_a_dimension_of_each_feature(name, W, expected):
    assert feature_dimensions(W).tolist() == pytest.approx([expected] * W.shape[1], rel=1e-12)
    assert float(feature_dimensions(W).sum()) <= len(W) + 1e-12


def test_dimensions_do_not_depend_on_the_basis_and_a_feature_that_is_not_stored_has_none():
    W = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), **DOUBLE)
    assert torch.allclose(feature_dimensions(turned(3, seed=2) @ W), feature_dimensions(W), rtol=1e-12)
    W[:, 2] = 0
    assert feature_dimensions(W)[2] == 0 and float(feature_dimensions(W).sum()) <= 3


@pytest.mark.parametrize(
    "responses, expected",
    [
        ([[3.0, 0.0, 0.0], [0.0, -0.1, 0.0], [0.0, 0.0, 1.0]], [1.0, 1.0, 1.0]),  # monosemantic
        ([[2.0, 2.0, 0.0, 0.0], [1.0, -1.0, 1.0, 1.0]], [2.0, 4.0]),
        ([[1.0, math.sqrt(0.5)]], [1.8]),  # squares 1 and 1/2: (3/2)^2 / (5/4)
        ([[0.0, 0.0]], [0.0]),  # dead
    ],
)
def test_the_number_of_features_of_each_neuron(responses, expected):
    assert features_per_neuron(torch.tensor(responses, **DOUBLE)).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.fixture(scope="module")
def pentagon():
    return train_superposition(5, 2, density=0.05, steps=600, lr=0.05)


def test_five_sparse_features_in_two_dimensions_form_a_pentagon(pentagon):
    """Elhage et al. (2022): dimensionality 2/5 for each feature, neighbours 72 degrees apart."""
    assert pentagon.dimensions.tolist() == pytest.approx([0.4] * 5, abs=0.02)
    x, y = pentagon.W
    angles = torch.atan2(y, x).rad2deg().sort().values
    gaps = torch.cat([angles.diff(), angles[:1] + 360 - angles[-1:]])
    assert gaps.tolist() == pytest.approx([72] * 5, abs=3)
    assert pentagon.losses[-1] < pentagon.losses[0] / 3


def neurons(density):
    importance = [0.7**i for i in range(6)]
    return train_superposition(6, 3, hidden="relu", density=density, importance=importance, steps=300, lr=0.06)


def test_neurons_become_polysemantic_when_features_are_sparse():
    dense, sparse = neurons(0.5), neurons(0.05)
    assert dense.n_polysemantic == 0 and dense.per_neuron.tolist() == pytest.approx([1] * 3, abs=0.1)
    assert (dense.dimensions > 0.5).tolist() == [True] * 3 + [False] * 3  # the three most important, a neuron each
    assert sorted(dense.responses[:, :3].argmax(0).tolist()) == [0, 1, 2]
    assert sparse.n_polysemantic == 3 and float(sparse.per_neuron.min()) > 1.5
    assert int((sparse.dimensions > 0.2).sum()) > 3  # more features than neurons are stored


def test_responses_are_those_of_a_feature_alone_and_the_table_names_the_strongest_neuron(pentagon):
    assert torch.equal(pentagon.responses, pentagon.W)
    table = pentagon.table()
    assert [row[0] for row in table.rows] == list(range(5)) and table.rows[0][1] == 1.0
    assert [row[4] for row in table.rows] == pentagon.W.abs().argmax(0).tolist()
    assert "0.4" in pentagon.figure().layout.title.text


def test_the_same_seed_gives_the_same_toy():
    short = [train_superposition(3, 2, steps=3, seed=seed).W for seed in (0, 0, 1)]
    assert torch.equal(short[0], short[1]) and not torch.equal(short[0], short[2])


@pytest.mark.parametrize("asked, says", [
    ({"density": 0.0}, "density is a probability above 0 and at most 1, got 0.0"),
    ({"density": 1.5}, "at most 1, got 1.5"),
    ({"n_hidden": 0}, "n_hidden is a whole number of at least 1"),
    ({"n_features": 0}, "n_features is a whole number of at least 1"),
    ({"importance": [1.0]}, "one number above 0 for each of 5 features"),
    ({"importance": [1.0, 1.0, 1.0, 1.0, -1.0]}, "one number above 0 for each of 5 features"),
    ({"steps": 0}, "steps is a whole number of at least 1"),
    ({"lr": 0.0}, "(?i)learning rate|lr"),
])  # fmt: skip
def test_a_toy_that_cannot_be_trained_is_refused(asked, says):
    with refused(InputError, says):
        train_superposition(**asked)


def test_a_hidden_layer_that_does_not_exist_is_refused():
    with refused(HooklensError, "no kind of hidden layer named 'rleu'; closest: relu"):
        train_superposition(hidden="rleu")
