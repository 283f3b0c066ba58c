"""Sweeps return what TransformerLens 3.9.0's own patching functions return, on models that both can build."""

import pytest
import torch
from model.parity import transformer_lens_model
from recorded_patching import RECORDED

import hooklens as hl

CLEAN = torch.tensor([[1, 5, 2, 7, 3, 0], [4, 4, 9, 10, 8, 6]])
CORRUPTED = torch.tensor([[1, 5, 6, 7, 3, 0], [4, 2, 9, 10, 1, 6]])


@pytest.mark.parametrize(("name", "site", "by"), RECORDED)
def test_the_same_numbers(name, site, by):
    model = transformer_lens_model(name)
    metric = hl.logit_diff(model, answer=3, wrong_answer=7)
    sweep = hl.patch(model, CLEAN, CORRUPTED, metric, site=site, by=by)
    assert sweep.how == "engine"
    expected = torch.tensor(RECORDED[name, site, by]).view_as(sweep.values)
    torch.testing.assert_close(sweep.values, expected, atol=1e-4, rtol=1e-4)
