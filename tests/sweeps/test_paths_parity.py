"""Path patching returns what a loop over TransformerLens 3.9.0's hooks returns, on models that both can build."""

import pytest
import torch
from model.parity import transformer_lens_model
from path_loop import HELD
from recorded_paths import RECORDED

import hooklens as hl
from hooklens.plugins.patching.path import path_patch

CLEAN = torch.tensor([[1, 5, 2, 7, 3, 0], [4, 4, 9, 10, 8, 6]])
CORRUPTED = torch.tensor([[1, 5, 6, 7, 3, 0], [4, 2, 9, 10, 1, 6]])


@pytest.mark.parametrize("semantics", HELD)
@pytest.mark.parametrize(("name", "receivers"), RECORDED)
def test_the_same_numbers(name, receivers, semantics):
    model = transformer_lens_model(name)
    metric = hl.logit_diff(model, answer=3, wrong_answer=7)
    one_each = {"final": lambda layer, head: "final", "mlp_in": lambda layer, head: ("mlp", layer)}
    asked = [one_each.get(kind, lambda layer, head, kind=kind: (kind, layer, head))(*at) for kind, *at in receivers]
    sweep = path_patch(model, CLEAN, CORRUPTED, metric, receivers=HELD[semantics](asked))
    assert sweep.how == "engine"
    expected = torch.tensor(RECORDED[name, receivers][semantics])
    torch.testing.assert_close(sweep.values, expected, atol=1e-5, rtol=1e-5)
