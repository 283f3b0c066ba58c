"""Stacked weights: a copy to read, whose writes by layer reach the model and whose other writes are refused."""

import operator

import einops
import pytest
import torch
from zoo import TOKENS, zoo_model

from hooklens.core.errors import InputError
from hooklens.model.transformer import HookedTransformer
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
    with pytest.raises(InputError, match="cannot be assigned shape"):
        setattr(model, name, torch.zeros(3))


def test_a_layer_taken_by_index_is_its_own_weight_so_that_no_write_to_it_is_lost():
    model = zoo_model("gpt2")
    with torch.no_grad():
        model.W_Q[0].zero_()
        model.W_K[1][0] = 3.0
        model.W_V[1, 0] *= 0
    assert (own(model, "W_Q", 0) == 0).all() and (own(model, "W_K", 1)[0] == 3).all()
    assert (own(model, "W_V", 1)[0] == 0).all() and (own(model, "W_V", 1)[1] != 0).all()


def test_a_loop_over_layers_writes_to_the_layers():
    """It used to write to slices of the copy."""
    for layers in (lambda w: w, lambda w: w.unbind(), lambda w: torch.unbind(w, dim=0), lambda w: w.unbind(-4)):
        model = zoo_model("gpt2")
        with torch.no_grad():
            for weight in layers(model.W_Q):
                weight[0] = 0
        assert all((block.attn.W_Q[0] == 0).all() and (block.attn.W_Q[1] != 0).all() for block in model.blocks)


def test_a_layer_that_does_not_exist_says_which_do():
    model = zoo_model("gpt2")
    said = r"layer (9|-3) of a stacked weight asked for; there are layers 0 to 1 \(or -2 to -1\)"
    for ask in (lambda w: w[9], lambda w: w[-3, 0], lambda w: w.__setitem__(9, 0), lambda w: w.__setitem__((9, 0), 0)):
        with pytest.raises(InputError, match=said):
            ask(model.W_Q)


@pytest.mark.parametrize(
    "part",
    [
        lambda w: w.view(-1),
        lambda w: w[:, 1],
        lambda w: w[..., 0],
        lambda w: w[0:1],
        lambda w: w[torch.tensor(1)],
        lambda w: w.mT,
        lambda w: w.detach(),
        lambda w: w.data,
        lambda w: w.unbind(1)[0],
        lambda w: w.chunk(2)[1],
        lambda w: w[:, 1][0].flatten().detach()[:3],
        lambda w: einops.rearrange(w, "layer head m d -> layer (head m) d"),
    ],
)
def test_a_write_into_part_of_the_copy_raises_rather_than_doing_nothing(part):
    model = zoo_model("gpt2")
    before = model.W_Q.detach().clone()
    for write in (
        lambda w: w.zero_(),
        lambda w: w.__setitem__(0, 0),
        lambda w: operator.imul(w, 2),
        lambda w: torch.nn.init.normal_(w),
    ):
        with torch.no_grad(), pytest.raises(InputError, match=r"change this copy, not the model.*or clone\(\) it"):
            write(part(model.W_Q))
    assert torch.equal(model.W_Q.detach(), before)
    mine = part(model.W_Q).clone()
    assert type(mine) is torch.Tensor and (mine.detach().zero_() == 0).all()


def test_gradients_go_through_views_of_the_copy():
    model = zoo_model("gpt2")
    model.W_Q[:, 1].square().sum().backward()
    weight = model.blocks[0].attn.q.weight
    assert torch.allclose(weight.grad[4:8], 2 * weight[4:8]) and (weight.grad[:4] == 0).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
def test_a_function_of_views_of_the_copy_compiles():
    if hasattr(HookedTransformer.forward, "__wrapped__"):
        pytest.skip("the checks of executed types are not traceable")
    model = zoo_model("gpt2")

    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return self.model.W_Q[:, 1].square().sum() + self.model.W_Q.mT[1].sum()

    assert torch.allclose(torch.compile(Reads(), backend="eager")(), Reads()())


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
        model.W_Q[:, 0] * 2,
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


def test_a_query_heads_number_on_grouped_keys_says_which_entry_it_reads():
    """`model.W_K[0, query_head]` ended in torch's bare IndexError."""
    model = zoo_model("llama")  # 4 query heads, 2 key/value heads
    for index in ((0, 3), (slice(None), 3), (torch.tensor([0]), 3), (0, 0, 99)):
        with pytest.raises(InputError, match=r"does not fit.*\[2, 2, 8, 4\].*h // \(cfg.n_heads // cfg"):
            _ = model.W_K[index]
    with pytest.raises(InputError, match="does not fit"):
        model.W_V[1, 2] = 0.0


def test_saved_weights_are_plain_tensors_that_load_with_weights_only(tmp_path):
    model = tiny_model()
    weights = {"stacked": model.W_K, "part": model.W_K[:, 0], "own": model.blocks[0].attn.W_K, "bias": model.b_V[1]}
    torch.save({name: weight.detach() for name, weight in weights.items()}, tmp_path / "weights.pt")
    torch.save(model.W_Q, tmp_path / "graph.pt")
    for name, read in torch.load(tmp_path / "weights.pt", weights_only=True).items():
        assert type(read) is torch.Tensor and torch.equal(read, weights[name])
    assert torch.equal(torch.load(tmp_path / "graph.pt", weights_only=True), model.W_Q)
