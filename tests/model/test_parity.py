"""Every number of every hook point as TransformerLens 3.9.0 computes it, on three tiny models."""

import pytest
import torch
from parity import CONFIGS, SIZES, TOKENS, fill, summary
from recorded_transformer_lens import RECORDED

from hooklens.model.config import Biases
from hooklens.model.transformer import HookedTransformer
from hooklens.testing import tiny_model

WEIGHTS = {
    "attn": ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"),
    "mlp": ("W_in", "W_gate", "W_out", "b_in", "b_out"),
}


def transformer_lens_model(name: str) -> HookedTransformer:
    """The model whose weights, in TransformerLens's shapes, are what the formula says."""
    model = tiny_model(**SIZES | {"biases": Biases(unembed=True)} | CONFIGS[name])
    with torch.no_grad():
        model.W_E.copy_(fill("embed.W_E", model.W_E.shape))
        if model.pos_embed is not None:
            model.W_pos.copy_(fill("pos_embed.W_pos", model.W_pos.shape))
        for layer, block in enumerate(model.blocks):
            for part, weights in WEIGHTS.items():
                for weight in weights:
                    view = getattr(getattr(block, part), weight, None)
                    if view is not None:
                        view.copy_(fill(f"blocks.{layer}.{part}.{weight}", view.shape))
            if model.cfg.gated_mlp:
                block.mlp.b_in.zero_()  # as recorded: TransformerLens adds it after the product
            for norm in ("ln1", "ln2"):
                fill_norm(getattr(block, norm, None), f"blocks.{layer}.{norm}")
        fill_norm(model.ln_final, "ln_final")
        model.W_U.copy_(fill("unembed.W_U", model.W_U.shape))
        if model.b_U is not None:
            model.b_U.copy_(fill("unembed.b_U", model.b_U.shape))
    return model


def fill_norm(norm, name: str) -> None:
    for ours, theirs in (("weight", "w"), ("bias", "b")):
        p = getattr(norm, ours, None)
        if p is not None:
            p.copy_(fill(f"{name}.{theirs}", p.shape))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_every_hook_point_equal_transformer_lens(name):
    model, recorded = transformer_lens_model(name), RECORDED[name]
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS, names=model.hook_names())
    assert summary(logits) == pytest.approx(recorded["logits"], abs=1e-5)
    assert logits[0, -1, :8].tolist() == pytest.approx(recorded["last"], abs=1e-5)
    for point, (shape, *numbers) in (recorded["points"] | recorded["inputs"]).items():
        assert tuple(cache[point].shape) == shape, point
        assert summary(cache[point]) == pytest.approx(numbers, abs=1e-5), point


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_firing_order_equal_transformer_lens(name):
    model, recorded = transformer_lens_model(name), RECORDED[name]
    assert set(model.hook_names()) == {*recorded["points"], *recorded["inputs"]}
    assert [n for n in model.hook_names() if n in recorded["points"]] == list(recorded["points"])
