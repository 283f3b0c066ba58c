"""Packed weights: the same numbers, never stale, never needed, off by one setting."""

import pytest
import torch
from close import close
from packing import needs_packing
from torch.nn import functional as F
from zoo import TOKENS, LowRank, wrap_layers, zoo_model

from hooklens.model import linear
from hooklens.model.config import Biases
from hooklens.model.linear import (
    ENV,
    Linear,
    _measured,
    matrix_of,
    packed_linears,
    packing_pays,
    packing_works,
    without_bias,
)
from hooklens.plugins.heads.copy_suppression import score_copy_suppression
from hooklens.plugins.heads.copying import score_copying
from hooklens.plugins.lens.affine_lens import train_tuned_lens
from hooklens.plugins.lens.logit_attribution import direct_logit_attribution
from hooklens.testing import tiny_model


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Linear(24, 16)


@pytest.fixture
def x():
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))


def plain(layer, x):
    return F.linear(x, layer.weight, layer.bias)


@needs_packing
@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize("bias", [True, False])
def test_products_agree(rows, bias):
    torch.manual_seed(0)
    layer, x = Linear(24, 16, bias=bias), torch.randn(rows, 24)
    with torch.no_grad(), packed_linears(enabled=True) as scope:
        assert close(layer(x), plain(layer, x), ulps=1000) and layer in scope.packs
        assert close(layer(x[:, None]), plain(layer, x[:, None]), ulps=1000)
        assert close(layer(x.T.contiguous().T), plain(layer, x), ulps=1000)


@needs_packing
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "post"])
def test_a_whole_model_agrees(kind):
    model = zoo_model(kind)
    with torch.no_grad():
        expected = model(TOKENS)
        with packed_linears(enabled=True) as scope:
            assert close(model(TOKENS), expected, ulps=1000) and len(scope.packs) > 8
            _, cache = model.run_with_cache(TOKENS, names="result")
        assert close(cache["result", 0], model.run_with_cache(TOKENS, names="result")[1]["result", 0], ulps=1000)


@needs_packing
def test_a_pack_is_never_stale(layer, x):
    with torch.no_grad(), packed_linears(enabled=True):
        layer(x)
        edits = [
            lambda: layer.weight.mul_(2),
            lambda: layer.weight[3].zero_(),
            lambda: setattr(layer, "weight", torch.nn.Parameter(torch.randn(16, 24))),
            lambda: setattr(layer.weight, "data", torch.randn(16, 24)),
            lambda: layer.load_state_dict(Linear(24, 16).state_dict()),
            lambda: layer.bias.add_(1),
        ]
        for edit in edits:
            edit()
            assert close(layer(x), plain(layer, x), ulps=1000)


@needs_packing
def test_a_weight_that_takes_a_freed_ones_address_is_packed_anew(layer, x):
    with torch.no_grad(), packed_linears(enabled=True):
        for scale in range(1, 30):
            weight = torch.full((16, 24), float(scale))
            got = torch.func.functional_call(layer, {"weight": weight}, (x,))
            assert torch.allclose(got, F.linear(x, weight, layer.bias), rtol=1e-4, atol=1e-3)
            del weight, got


@needs_packing
def test_torchs_own_path_runs_where_packing_cannot(layer, x):
    with packed_linears(enabled=True) as scope:
        out = layer(x)
        out.sum().backward()
        assert layer.weight.grad is not None and not scope.packs
        with torch.no_grad():
            assert layer.double()(x.double()).dtype == torch.float64 and not scope.packs
            layer.float()
            got = torch.func.vmap(lambda row: layer(row))(x)
            assert close(got, plain(layer, x)) and not scope.packs
    with torch.inference_mode(), packed_linears(enabled=True):
        born_inside = Linear(24, 16)
        assert torch.equal(born_inside(x), plain(born_inside, x))
        assert close(layer(x), plain(layer, x), ulps=1000)


@needs_packing
def test_packs_live_in_the_outermost_scope_and_end_with_it(layer, x):
    with torch.no_grad():
        with packed_linears(enabled=True) as outer:
            with packed_linears(enabled=True) as inner:
                layer(x)
            assert layer in outer.packs and not inner.packs
            layer(x)
        assert not outer.packs
        assert torch.equal(layer(x), plain(layer, x))


def test_one_setting_switches_it_off(layer, x, monkeypatch):
    monkeypatch.setenv(ENV, "0")
    assert not packing_works() and not packing_pays()
    for enabled in (None, True):
        with torch.no_grad(), packed_linears(enabled=enabled) as scope:
            assert torch.equal(layer(x), plain(layer, x)) and not scope.packs


def test_without_the_operators_torchs_own_path_is_there(layer, x, monkeypatch):
    _measured.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    try:
        with torch.no_grad(), packed_linears() as scope:
            assert torch.equal(layer(x), plain(layer, x)) and not scope.packs
        assert _measured() == 0.0
    finally:
        _measured.cache_clear()


def forbidding(wrapped):
    """Token 7 is never said; a LoRA beside the unembedding, or the same numbers merged into its weight."""
    model = tiny_model(biases=Biases(unembed=True), dtype=torch.float64)
    with torch.no_grad():
        model.b_U[7] = float("-inf")
        lora = LowRank(model.unembed.linear)
        if not wrapped:
            model.unembed.linear.weight += lora.B @ lora.A
    return wrap_layers(model, "unembed") if wrapped else model


TEXTS_WITHOUT = torch.randint(7, (6, 8), generator=torch.Generator().manual_seed(0))
METHODS = {
    "direct_logit_attribution": lambda model: direct_logit_attribution(model, TEXTS_WITHOUT, answer=3, wrong_answer=5),
    "copying": lambda model: score_copying(model, draws=10),
    "copy_suppression": lambda model: score_copy_suppression(model, TEXTS_WITHOUT, heads=["L1H1"]),
    "tuned_lens": lambda model: train_tuned_lens(model, TEXTS_WITHOUT, steps=2)[1],
}


@pytest.mark.parametrize("name", METHODS)
def test_a_wrapped_unembedding_that_forbids_a_token_gave_nan(name):
    found, wanted = (vars(METHODS[name](forbidding(wrapped))) for wrapped in (True, False))
    for field, value in found.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, wanted[field], rtol=1e-6, atol=1e-9, equal_nan=True, msg=field)


def test_the_matrix_of_a_wrapped_layer_is_there_where_its_bias_is_minus_infinity():
    wrapped, plain = (forbidding(kind).unembed.linear for kind in (True, False))
    torch.testing.assert_close(matrix_of(wrapped, 8), plain.weight.detach(), rtol=1e-12, atol=1e-12)
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(without_bias(wrapped, x), x @ plain.weight.T, rtol=1e-12, atol=1e-12)
    assert wrapped(x)[:, 7].isneginf().all() and wrapped.base.bias[7].isneginf()


def test_the_product_of_one_row_is_chosen_by_its_time_and_measured_once(monkeypatch):
    timed = []

    def seconds(work, tries):
        products = work()
        timed.append((len(products), products[0].ndim))
        return {2: 1.0, 1: 2.0}[products[0].ndim]  # of a row, and of a vector

    monkeypatch.setattr(linear, "_seconds", seconds)
    monkeypatch.setattr(linear, "_vector_gains", {})
    monkeypatch.setattr(linear, "_WORTH_MEASURING", 12)
    assert linear.vector_pays([torch.ones(2, 3)]) and not timed  # too small to matter
    large = [torch.ones(4, 3)] * 9
    assert not linear.vector_pays(large) and not linear.vector_pays(large)
    assert timed == [(8, 2), (8, 1)]
