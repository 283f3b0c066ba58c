"""ablate and attribution_patching return what loops over TransformerLens 3.9.0's hooks return."""

import pytest
import torch
from model.parity import transformer_lens_model
from recorded_ablation import ABLATIONS, ATTRIBUTIONS

import hooklens as hl
from hooklens.plugins.patching.ablation import ablate
from hooklens.plugins.patching.attribution_patching import attribution_patch

PROMPTS = torch.tensor([[1, 5, 2, 7, 3, 0], [4, 4, 9, 10, 8, 6], [2, 0, 0, 5, 7, 1]])
CORRUPTED = torch.tensor([[1, 5, 6, 7, 3, 0], [4, 2, 9, 10, 1, 6], [2, 0, 3, 5, 7, 1]])


@pytest.mark.parametrize(("name", "kind"), ABLATIONS)
def test_ablations(name, kind):
    model = transformer_lens_model(name)
    value = hl.Mean(PROMPTS) if kind == "mean" else kind  # the loop's mean is over all prompts
    sweep = ablate(model, PROMPTS, hl.logit_diff(model, answer=3, wrong_answer=7), value=value)
    expected = torch.tensor(ABLATIONS[name, kind]).view_as(sweep.per_prompt)
    torch.testing.assert_close(sweep.per_prompt, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "site", "by"), ATTRIBUTIONS)
def test_attributions(name, site, by):
    model = transformer_lens_model(name)
    metric = hl.logit_diff(model, answer=3, wrong_answer=7)
    found = attribution_patch(model, PROMPTS, CORRUPTED, metric, site=site, by=by, exact=0)
    expected = torch.tensor(ATTRIBUTIONS[name, site, by]).view_as(found.per_pair)
    torch.testing.assert_close(found.per_pair, expected, atol=1e-5, rtol=1e-5)
