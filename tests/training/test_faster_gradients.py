"""Products by oneDNN and gradients row by row: the numbers of autograd, and a run keeps what it began with."""

import json

import pytest
import torch
from close import close
from packing import needs_packing

import hooklens as hl
from hooklens.data.modular import modular_arithmetic
from hooklens.model import linear
from hooklens.model.embed import Embedding, _Rows
from hooklens.model.linear import GradientVector, Linear, gradients_into
from hooklens.testing import tiny_model
from hooklens.training import loop
from hooklens.training.optimizers import SGD
from hooklens.training.parameter_vector import ParameterVector
from hooklens.training.training_settings import Settings

TOKENS = torch.tensor([[1, 2, 1, 3], [4, 4, 4, 0]])


def gradients(model, *, faster):
    model.zero_grad()
    model.train()
    into = GradientVector({}, products=faster, rows=faster)
    with gradients_into(into):
        model(TOKENS).square().sum().backward()
    into.add_rows()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@needs_packing
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_autograd(monkeypatch, tied, dtype):
    monkeypatch.setattr(linear, "_WORTH_ONEDNN", 0)
    model = tiny_model(tie_word_embeddings=tied, dtype=dtype)
    plain, faster = gradients(model, faster=False), gradients(model, faster=True)
    largest = max(float(grad.abs().max()) for grad in plain.values())  # that of a key's bias is zero but for rounding
    bound = 100 * torch.finfo(dtype).eps * largest
    assert all(float((faster[name] - plain[name]).abs().max()) < bound for name in plain)


@needs_packing
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_several_passes_are_written_to_one_vector(monkeypatch, tied):
    monkeypatch.setattr(linear, "_WORTH_ONEDNN", 100)  # the products of the readout and of the MLP
    model = tiny_model(tie_word_embeddings=tied)
    vector = ParameterVector(model)
    grads = torch.full_like(vector.values, 7.0)
    views = vector.views(grads)
    into = GradientVector({id(vector.parameters[name]): view for name, view in views.items()})
    for row in TOKENS:
        with gradients_into(into):
            model(row[None]).square().sum().backward()
        into.add_rows()
    assert 0 < len(into.written) < len(views)
    vector.gather_gradients(grads, into.written)
    plain = gradients(model, faster=False)
    largest = max(float(grad.abs().max()) for grad in plain.values())
    bound = 100 * torch.finfo(torch.float32).eps * largest
    assert all(float((views[name] - plain[name]).abs().max()) < bound for name in plain)


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 1, 24)])
def test_products_and_their_gradients_agree(monkeypatch, bias, shape):
    monkeypatch.setattr(linear, "_WORTH_ONEDNN", 0)
    layer, x = Linear(24, 16, bias=bias), torch.randn(shape, requires_grad=True)
    results = []
    for enabled in (False, True):
        with gradients_into(GradientVector({}, products=enabled)):
            out = layer(x)
        results.append((out, *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])))
    assert type(out.grad_fn).__name__ == "_ProductBackward"
    assert all(close(a, b, ulps=1000) for a, b in zip(*results, strict=True))


def test_a_frozen_embedding_gets_no_gradient():
    model = tiny_model()
    model.embed.weight.requires_grad_(False)
    into = GradientVector({}, products=False)
    with gradients_into(into):
        model(TOKENS).sum().backward()
    into.add_rows()
    assert model.embed.weight.grad is None and model.unembed.linear.weight.grad is not None


@needs_packing
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_gradient_sees_all_of_it(monkeypatch, tied, register):
    monkeypatch.setattr(linear, "_WORTH_ONEDNN", 0)
    monkeypatch.setattr(loop, "faster_gradients_pay", lambda: True)
    data = modular_arithmetic(p=5, fraction=0.8)
    model = tiny_model(d_vocab=data.d_vocab, tie_word_embeddings=tied)
    before = model.embed.weight.detach().clone()

    def zero(parameter):
        parameter.grad.zero_()

    hook = (lambda grad: grad * 0) if register == "register_hook" else zero
    getattr(model.embed.weight, register)(hook)
    hl.train(model, data, steps=3, settings=Settings(batch=4, optimizer=SGD(lr=0.3)))
    assert torch.equal(model.embed.weight, before)


@needs_packing
@pytest.mark.parametrize("began", ["oneDNN", "torch"])
def test_a_resumed_run_keeps_the_products_that_it_began_with(monkeypatch, tmp_path, began):
    seen = []

    def note(of, products, rows):
        seen.append(products)
        return GradientVector(of, products=products, rows=rows)

    monkeypatch.setattr(loop, "GradientVector", note)
    data, settings = modular_arithmetic(p=5, fraction=0.8), Settings(batch=4, schedule="constant")
    for steps, pays in ((2, began == "oneDNN"), (4, began != "oneDNN")):
        monkeypatch.setattr(loop, "faster_gradients_pay", lambda pays=pays: pays)
        hl.train(tiny_model(d_vocab=data.d_vocab), data, steps=steps, out=tmp_path, settings=settings)
    assert seen == [began == "oneDNN"] * 4
    assert json.loads((tmp_path / "run.json").read_text())["content"]["products"] == began


@needs_packing
def test_an_inner_block_writes_to_its_own_vector_and_the_outer_one_goes_on():
    layer, outer, inner = Embedding(4, 2), GradientVector({}), GradientVector({})
    tokens = torch.tensor([[1, 2]])
    with gradients_into(outer):
        with gradients_into(inner):
            _Rows.apply(layer.weight, tokens).sum().backward()
        _Rows.apply(layer.weight, tokens).sum().backward()
    assert len(outer.rows) == len(inner.rows) == 1
    inner.add_rows()
    assert layer.weight.grad.sum(-1).tolist() == [0.0, 2.0, 2.0, 0.0]
