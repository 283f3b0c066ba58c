"""Folded matrices against what the modules compute; wrapped layers; what cannot be folded is refused."""

import pytest
import torch
from model.zoo import TOKENS, ZOO, vector_model, zoo_model
from torch import nn

from hooklens.core.errors import InputError
from hooklens.model.norms import Passage
from hooklens.plugins.weights.matrices import (
    embedding_matrix,
    embedding_rows,
    folded_heads,
    folded_neurons,
    heads_of,
    unembedding_rows,
)
from hooklens.plugins.weights.overlap import measure_overlap
from hooklens.plugins.weights.spectrum import measure_spectrum

FOLDABLE = [name for name in sorted(ZOO) if not name.startswith("post")]


def no_bias(norm, x):
    """The norm's output without its bias."""
    return norm.linearised(x, norm.rms(norm.centred(x)))


@pytest.mark.parametrize("name", FOLDABLE)
def test_reading_the_stream_through_a_folded_matrix_is_reading_its_norm(name):
    model = zoo_model(name, dtype=torch.float64)
    x = model.run_with_cache(TOKENS, names=("resid_pre", -1))[1]["resid_pre", -1]
    block, heads = model.blocks[-1], folded_heads(model, model.cfg.n_layers - 1)
    group = model.cfg.n_heads // model.cfg.n_key_value_heads
    normed, scale = x, torch.ones_like(x[..., :1])
    if block.ln1 is not None:
        normed, scale = no_bias(block.ln1, x), block.ln1.rms(block.ln1.centred(x))
    expected = torch.einsum("bpd,hde->bphe", normed, block.attn.W_V).repeat_interleave(group, 2)
    torch.testing.assert_close(torch.einsum("bpd,hde->bphe", x / scale, heads.V), expected, atol=1e-10, rtol=1e-10)
    final = x if model.ln_final is None else model.ln_final.linearised(x, torch.ones_like(x[..., :1]))
    torch.testing.assert_close(x @ unembedding_rows(model).T, final @ model.W_U, atol=1e-10, rtol=1e-10)


def test_norms_of_queries_and_keys_give_their_weight_and_keep_their_scale():
    model = zoo_model("qwen3", dtype=torch.float64)
    attn, raw, folded = model.blocks[0].attn, heads_of(model, 0), folded_heads(model, 0)
    x = model.embed(TOKENS)
    q = torch.einsum("bpd,hde->bphe", no_bias(model.blocks[0].ln1, x), raw.Q)
    ours = torch.einsum("bpd,hde->bphe", x, folded.Q)
    torch.testing.assert_close(
        torch.nn.functional.normalize(ours, dim=-1),
        torch.nn.functional.normalize(attn.q_norm(q), dim=-1),
        atol=1e-5,  # q_norm's eps beside short vectors
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "no_norm"])
def test_an_embedding_row_is_the_token_as_a_reader_meets_it(name):
    model = zoo_model(name, dtype=torch.float64)
    block = model.blocks[0]
    rows = embedding_rows(model, block.reads_through("attn"))
    tokens = torch.arange(11)[None]
    expected = no_bias(block.ln1, model.embed(tokens)) if block.ln1 is not None else model.embed(tokens)
    matrix = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        rows @ block.reads_through("attn").folded(matrix), expected[0] @ matrix, atol=1e-10, rtol=1e-10
    )


class Lora(nn.Module):
    """A wrapped layer, as adapters are."""

    def __init__(self, inner, seed):
        super().__init__()
        self.inner = inner
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(2, inner.in_features, generator=generator, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(inner.out_features, 2, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return self.inner(x) + x @ self.down.T @ self.up.T


def test_wrapped_layers_count_with_what_they_add():
    wrapped, merged = (zoo_model("llama", dtype=torch.float64) for _ in "ab")
    for layer in (0, 1):
        for part, names in (("attn", "qkvo"), ("mlp", ("in_", "gate", "out"))):
            for seed, name in enumerate(names):
                inner = getattr(getattr(wrapped.blocks[layer], part), name)
                lora = Lora(inner, seed)
                setattr(getattr(wrapped.blocks[layer], part), name, lora)
                with torch.no_grad():
                    getattr(getattr(merged.blocks[layer], part), name).weight += lora.up @ lora.down
    for ours, expected in (
        (heads_of(wrapped, 1), heads_of(merged, 1)),
        (folded_neurons(wrapped, 0), folded_neurons(merged, 0)),
    ):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(
        measure_spectrum(wrapped).OV.singular, measure_spectrum(merged).OV.singular, atol=1e-9, rtol=1e-9
    )
    a, b = (measure_overlap(model, draws=2).composition for model in (wrapped, merged))
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9, equal_nan=True)


class WrappedEmbedding(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, tokens):
        return self.inner(tokens) + 1.0


def test_a_wrapped_embedding_counts_with_what_it_adds():
    model = zoo_model("gpt2", dtype=torch.float64)
    before = embedding_matrix(model)
    model.embed = WrappedEmbedding(model.embed)
    torch.testing.assert_close(embedding_matrix(model), before + 1)


def test_what_cannot_be_folded_is_refused_with_a_reason():
    with pytest.raises(InputError, match="post-norm"):
        folded_heads(zoo_model("post"), 0)
    with pytest.raises(InputError, match="without MLPs"):
        folded_neurons(zoo_model("attn_only"), 0)
    with pytest.raises(InputError, match="reads vectors"):
        embedding_rows(vector_model(), Passage())
