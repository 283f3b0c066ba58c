"""Every number of every hook point as TransformerLens 3.9.0 computes it, on three tiny models."""

import pytest
import torch
from parity import CONFIGS, TOKENS, summary, transformer_lens_model
from recorded_transformer_lens import RECORDED


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
