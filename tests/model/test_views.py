"""Stacked weights: a copy to read, whose writes by layer reach the model and whose other writes are refused."""

import operator

import pytest
import torch
from zoo import TOKENS, zoo_model

from hooklens.core.errors import InputError
from hooklens.testing import tiny_model

NAMES = ["W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in", "W_out", "b_in", "b_out"]


def own(model, name, layer):
    block = model.blocks[layer]
    return getattr(block.attn if hasattr(block.attn, name) else block.mlp, name)


@pytest.mark.parametrize("name", NAMES)
def test_reading_is_the_stack_of_the_layers_and_indexing_by_layer_writes_through(name):
    model = zoo_model("gpt2")
    stacked = getattr(model, name)
    assert stacked.shape == (2, *own(model, name, 0).shape)
    assert all(torch.equal(stacked[layer], own(model, name, layer)) for layer in range(2))
    before = model(TOKENS)
    stacked[1, 0] = 7.0
    assert (own(model, name, 1)[0] == 7).all() and (stacked[1, 0] == 7).all() and (stacked[:, 0][1] == 7).all()
    assert (own(model, name, 0)[0] != 7).all() and not torch.allclose(model(TOKENS), before)
    stacked[-2] = 0
    assert (own(model, name, 0) == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_assigning_the_whole_writes_every_layer(name):
    model, other = zoo_model("gpt2"), tiny_model(seed=4)
    for value in (torch.randn(getattr(model, name).shape), getattr(other, name), getattr(model, name) * 2):
        expected = value.detach().clone()
        setattr(model, name, value)
        assert torch.equal(getattr(model, name).detach(), expected)
    with pytest.raises(InputError, match="was assigned one of shape"):
        setattr(model, name, torch.zeros(3))


def test_a_layer_taken_by_index_is_its_own_weight_so_that_no_write_to_it_is_lost():
    model = zoo_model("gpt2")
    with torch.no_grad():
        model.W_Q[0].zero_()
        model.W_K[1][0] = 3.0
        model.W_V[1, 0] *= 0
    assert (own(model, "W_Q", 0) == 0).all() and (own(model, "W_K", 1)[0] == 3).all()
    assert (own(model, "W_V", 1)[0] == 0).all() and (own(model, "W_V", 1)[1] != 0).all()


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.zero_(),
        lambda w: w.mul_(2),
        lambda w: w.copy_(w * 0),
        lambda w: operator.iadd(w, 1),
        lambda w: operator.imul(w, 2),
        lambda w: torch.add(w, 1, out=w),
        lambda w: torch.nn.init.zeros_(w),
        lambda w: w.__setitem__((slice(None), 0), 0),
        lambda w: w.__setitem__(torch.tensor([0]), 0),
        lambda w: w.__setitem__(True, 0),
    ],
)
def test_any_other_write_in_place_raises_and_changes_nothing(write):
    model = zoo_model("gpt2")
    before = model.W_Q.detach().clone()
    with torch.no_grad(), pytest.raises(InputError, match="stacked weight"):
        write(model.W_Q)
    assert torch.equal(model.W_Q.detach(), before)


def test_what_is_computed_from_it_is_a_plain_tensor_with_gradients_to_the_model():
    model = zoo_model("gpt2")
    for value in (
        model.W_Q * 2,
        model.W_Q[:, 0],
        model.W_Q.sum(),
        torch.stack([model.W_Q]),
        torch.einsum("lhmd->m", model.W_Q),
    ):
        assert type(value) is torch.Tensor
    model.W_Q.square().sum().backward()
    assert torch.allclose(model.blocks[1].attn.q.weight.grad, 2 * model.blocks[1].attn.q.weight)
    assert "tensor" in repr(model.W_Q) and model.W_Q.requires_grad


def test_an_assignment_of_another_models_stack_counts():
    """It was taken for the end of `model.W_Q[5] = x` and dropped."""
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    model.W_Q = other.W_Q
    assert torch.equal(model.blocks[1].attn.q.weight, other.blocks[1].attn.q.weight)
