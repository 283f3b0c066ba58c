"""Kernel smoothing and rank collapse: exact identities, the published bound, and what the parts of a model change."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.zoo import vector_model, zoo_model
from refused import refused

from hooklens.core.errors import HooklensError
from hooklens.model.config import Biases
from hooklens.plugins.algorithmic.icl.kernel_smoothing import compare_with_kernel, kernel_weights, smooth
from hooklens.plugins.algorithmic.icl.rank_collapse import (
    collapse_bound,
    composite_norm,
    measure_rank_collapse,
    residual_to_rank_one,
)
from hooklens.testing import check_plugin, tiny_model

TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 3, 7, 1, 0, 9]])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 6), d=st.integers(1, 8), norm=st.floats(0.1, 3), seed=st.integers(0, 99))
def test_for_keys_of_equal_norm_softmax_attention_is_the_kernel_smoother(n, d, norm, seed):
    q, k, v = normal(4, d, seed=seed), normal(n, d, seed=seed + 1), normal(n, 2, seed=seed + 2)
    k = norm * k / k.norm(dim=-1, keepdim=True)
    pattern = torch.softmax(q @ k.T / math.sqrt(d), -1)
    torch.testing.assert_close(kernel_weights(q, k, math.sqrt(d)), pattern, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(smooth(q, k, v, math.sqrt(d)), pattern @ v, atol=1e-12, rtol=1e-10)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 6), d=st.integers(1, 8), seed=st.integers(0, 99))
def test_other_keys_have_the_factor_of_their_norm(n, d, seed):
    q, k, variance = normal(4, d, seed=seed), normal(n, d, seed=seed + 1), math.sqrt(d)
    lifted = kernel_weights(q, k, variance) * (k.square().sum(-1) / (2 * variance)).exp()
    lifted = lifted / lifted.sum(-1, keepdim=True)
    torch.testing.assert_close(lifted, torch.softmax(q @ k.T / variance, -1), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_softmax_head_is_the_kernel_with_norms(name):
    model = zoo_model(name, dtype=torch.float64)
    found = compare_with_kernel(model, TOKENS)
    assert found.with_norms.max() < 1e-12 and (found.norm_spread > 1e-3).all()
    pattern = model.run_with_cache(TOKENS, names=["pattern"])[1]["pattern", 0][:, 0].detach()
    equal = torch.tril(torch.ones(6, 6, dtype=torch.float64)) / torch.arange(1, 7)[:, None]
    distance = (pattern - equal).abs().sum(-1)[:, 1:].mean() / 2  # the first query sees itself alone
    assert abs(float(distance - found.uniform[0, 0])) < 1e-12
    assert (found.kernel > 1e-6).all() and found.top(1).rows[0][1] == pytest.approx(float(found.kernel.max()))


def test_heads_with_normalised_keys_are_kernel_smoothers():
    """q/k norm without rotation gives keys of equal norm sqrt(d_head)."""
    model = tiny_model(qk_norm="RMS", dtype=torch.float64)
    found = compare_with_kernel(model, TOKENS)
    assert found.kernel.max() < 1e-4 and found.norm_spread.max() < 1e-4 and found.uniform.min() > 1e-3


def test_a_head_of_larger_keys_is_further_from_the_kernel():
    model = tiny_model(n_layers=1, dtype=torch.float64)
    with torch.no_grad():
        attn = model.blocks[0].attn
        attn.W_K[1], attn.W_Q[1] = attn.W_K[0] * 8, attn.W_Q[0] / 8  # the same pattern
        attn.k.bias.zero_()
        attn.q.bias.zero_()
    found = compare_with_kernel(model, TOKENS)
    torch.testing.assert_close(found.uniform[0, 0], found.uniform[0, 1])
    assert found.norm_spread[0, 1] == pytest.approx(64 * float(found.norm_spread[0, 0]))
    assert found.kernel[0, 1] > 2 * found.kernel[0, 0]


def test_what_is_no_softmax_is_refused():
    with refused(HooklensError, "the score function 'linear'"):
        compare_with_kernel(tiny_model(score_fn="linear"), TOKENS)
    with refused(HooklensError, "variance above 0"):
        kernel_weights(normal(1, 2), normal(1, 2), 0.0)


def test_vectors_that_do_not_fit_are_refused():
    with refused(HooklensError, r"vectors of one length.* got \[1, 2\] and \[1, 3\]"):
        kernel_weights(normal(1, 2), normal(1, 3), 1.0)
    with refused(HooklensError, r"a value for each of the 4 keys; got \[3, 2\]"):
        smooth(normal(1, 2), normal(4, 2), normal(3, 2), 1.0)
    with refused(HooklensError, "residual is a finite number of at least 0, got -1"):
        collapse_bound(-1.0, 0.5, 4, 1)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 5), d=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_residual_is_the_distance_to_the_nearest_matrix_of_equal_rows(n, d, seed):
    x, row = normal(n, d, seed=seed), normal(d, seed=seed + 1)
    left = residual_to_rank_one(x)
    assert left.norm() <= (x - row).norm() + 1e-12
    assert residual_to_rank_one(row.expand(n, d)).abs().max() < 1e-12
    torch.testing.assert_close(residual_to_rank_one(x + row), left)
    one, many = torch.linalg.matrix_norm(x, 1), torch.linalg.matrix_norm(x, torch.inf)
    torch.testing.assert_close(composite_norm(x), (one * many).sqrt())


def pure_attention(n_layers, size, seed=0):
    """Attention without norms, biases, positions and a mask, as in the theorem."""
    model = tiny_model(
        n_layers=n_layers,
        n_heads=1,
        attn_only=True,
        normalization_type=None,
        positional_embedding_type="none",
        mask="none",
        biases=Biases(qkv=False, o=False, mlp=False),
        seed=seed,
        dtype=torch.float64,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= size
    return model


@pytest.mark.parametrize("seed", range(3))
def test_pure_attention_stays_below_the_published_bound(seed):
    """Theorem 2.2 with gamma 1, for weights small enough that the bound falls."""
    model = pure_attention(3, 0.5, seed)
    found = measure_rank_collapse(model, TOKENS[:1])
    qk, ov = model.QK.AB[:, 0].detach(), model.OV.AB[:, 0].detach()
    beta = float((torch.linalg.matrix_norm(qk, 1) * composite_norm(ov)).max())
    start = float(found.residual[0, 0])
    bounds = [collapse_bound(start, beta, model.cfg.d_head, depth) for depth in range(4)]
    assert bounds[3] < bounds[2] < bounds[1]
    for depth in range(4):
        assert float(found.residual[0, depth]) <= bounds[depth] * (1 + 1e-9)


def test_the_bound_falls_cubically_in_each_layer():
    values = [collapse_bound(0.4, 0.3, 16, depth, n_heads=2, gamma=1.5) for depth in range(5)]
    base = 4 * 1.5 * 0.3 * 2 / 4
    for before, after in pairwise(values):
        assert after == pytest.approx(base * before**3)


def test_attention_alone_collapses_and_residual_connections_prevent_it():
    found = measure_rank_collapse(pure_attention(6, 1.0), TOKENS)
    alone, with_residual = (found.share[found.variants.index(name)] for name in ("attention", "attention + residual"))
    assert found.variants == ["attention", "attention + residual"]  # there are no MLPs
    assert alone[-1] < 1e-10 * alone[0] and with_residual[-1] > 0.3 * with_residual[0]
    # the theorem's rate is cubic: the logarithm falls by three times as much at each layer, until rounding ends it
    falls = alone[:4].log().diff()
    assert falls[1] < 2 * falls[0] < 0 and falls[2] < 2 * falls[1]


@pytest.mark.parametrize("block", ["pre", "parallel"])
def test_with_all_parts_on_the_streams_are_those_of_the_model(block):
    model = zoo_model("gpt2", block=block, dtype=torch.float64)
    found = measure_rank_collapse(model, TOKENS)
    _, cache = model.run_with_cache(TOKENS, names=["resid_pre", "resid_post"])
    streams = torch.stack([cache["resid_pre", 0], *(cache["resid_post", layer] for layer in range(2))])
    share = composite_norm(residual_to_rank_one(streams)) / composite_norm(streams)
    torch.testing.assert_close(found.share[-1], share.mean(1))


@pytest.mark.parametrize("kind", ["pre", "parallel"])
def test_each_variant_is_the_pass_written_out_by_hand(kind):
    model = zoo_model("gpt2", n_layers=1, block=kind, dtype=torch.float64)
    found = measure_rank_collapse(model, TOKENS)
    _, cache = model.run_with_cache(TOKENS, names=["resid_pre", "attn_out"])
    x, attn, block = cache["resid_pre", 0], cache["attn_out", 0], model.blocks[0]
    side = {  # side by side, the MLP reads the input of the block
        "attention + MLP": attn + block.mlp(block.ln2(x)),
        "attention + residual + MLP": x + attn + block.mlp(block.ln2(x)),
    }
    by_hand = {
        "attention": attn,
        "attention + residual": x + attn,
        "attention + MLP": attn + block.mlp(block.ln2(attn)),  # the MLP keeps its own residual connection
        "attention + residual + MLP": x + attn + block.mlp(block.ln2(x + attn)),
    }
    for name, stream in (by_hand | side if kind == "parallel" else by_hand).items():
        left = composite_norm(residual_to_rank_one(stream.detach())).mean()
        torch.testing.assert_close(found.residual[found.variants.index(name), 1], left)


def test_one_position_cannot_collapse():
    with refused(HooklensError, "at least 2; got inputs"):
        measure_rank_collapse(tiny_model(), TOKENS[:, :1])
    with refused(HooklensError, "post-norm"):
        measure_rank_collapse(tiny_model(block="post"), TOKENS)


@pytest.mark.parametrize("plugin", ["compare_with_kernel", "measure_rank_collapse"])
def test_the_contract(plugin):
    check_plugin(plugin, models={"vectors": vector_model(dtype=torch.float64)})


def test_positions_were_equal_in_float16_where_sums_overflow():
    model = tiny_model(attn_only=True, d_model=256, d_head=8)
    with torch.no_grad():
        model.W_E.mul_(400)
    wide = measure_rank_collapse(model, TOKENS).share
    narrow = measure_rank_collapse(model.half(), TOKENS).share
    torch.testing.assert_close(narrow, wide, atol=2e-3, rtol=1e-2)
    with torch.no_grad():
        model.W_E[1] = torch.nan
    with refused(HooklensError, "activations are not finite"):
        measure_rank_collapse(model, TOKENS)


def test_near_keys_had_equal_weights_in_float32_and_large_ones_nan_in_float16():
    """|q|^2 + |k|^2 - 2 q k of numbers near 1,000 has no digits left."""
    query, keys = torch.tensor([[1000.0, 0.0]]), torch.tensor([[1000.125, 0.0], [1000.25, 0.0]])
    exact = torch.softmax(-torch.tensor([0.125, 0.25]).square() / 0.02, -1)[None]
    torch.testing.assert_close(kernel_weights(query, keys, 0.01), exact)
    narrow = kernel_weights((300 * normal(2, 8)).half(), (300 * normal(3, 8)).half(), 2.0)
    assert narrow.dtype == torch.float16 and bool(narrow.isfinite().all())
    with refused(HooklensError, "real numbers with a point"):
        kernel_weights(query, [[1.0, 2.0]], 1.0)


def test_depths_whose_powers_overflow_have_a_bound():
    assert collapse_bound(0.5, 0.5, 4, 700) == 0.0 < 1e300 < collapse_bound(5.0, 0.5, 4, 700)


@pytest.mark.parametrize("measure", [measure_rank_collapse, compare_with_kernel])
def test_inputs_may_be_lists_and_a_method_is_called_first(measure):
    model = tiny_model()
    assert measure(model, TOKENS.tolist()).table().rows == measure(model, TOKENS).table().rows
    reader = vector_model()
    vectors = torch.randn(1, 3, reader.cfg.embed.d_in)
    assert measure(reader, vectors.tolist()).table().rows == measure(reader, vectors).table().rows
    for bad, says in ((vectors.tolist, r"called with \(\)"), ("abc", "vectors .* got 'abc'")):
        with refused(HooklensError, says):
            measure(reader, bad)
