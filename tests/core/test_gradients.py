"""Methods that need gradients, asked in inference mode."""

import importlib

import pytest
import torch

from hooklens.core.errors import InputError
from hooklens.testing import tiny_model

METHODS = ["patching.attribution_patching", "patching.input_attribution"]
METHODS += ["circuits.edge_attribution", "circuits.integrated_edges", "lens.logit_attribution", "lens.affine_lens"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_in_inference_mode_blames_inference_mode_and_not_the_metric(method):
    model, module = tiny_model(), importlib.import_module(f"hooklens.plugins.{method}")
    with torch.inference_mode(), pytest.raises(InputError, match=r"needs gradients, which torch.inference_mode\(\)"):
        module.demo(model)
    assert not any(p.requires_grad and p.grad is not None for p in model.parameters())
