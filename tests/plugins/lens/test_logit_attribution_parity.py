"""Attributions and lenses are those of TransformerLens 3.9.0, on models that both can build."""

import pytest
import torch
from model.parity import TOKENS, transformer_lens_model
from recorded_logit_attribution import RECORDED

from hooklens.plugins.lens.layer_lens import logit_lens
from hooklens.plugins.lens.logit_attribution import direct_logit_attribution

ANSWER, WRONG_ANSWER = torch.tensor([3, 1]), torch.tensor([7, 2])


@pytest.mark.parametrize(("name", "part"), [key for key in RECORDED if not key[1].startswith("lens")])
def test_the_same_attributions(name, part):
    wrong = WRONG_ANSWER if part.endswith("difference") else None
    found = direct_logit_attribution(transformer_lens_model(name), TOKENS, answer=ANSWER, wrong_answer=wrong)
    ours = getattr(found, part.split(" ")[0]).flatten(1)
    torch.testing.assert_close(ours, torch.tensor(RECORDED[name, part]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted({name for name, _ in RECORDED}))
def test_the_same_lens(name):
    lens = logit_lens(transformer_lens_model(name), TOKENS, answer=ANSWER)
    theirs = torch.tensor(RECORDED[name, "lens log prob"])
    torch.testing.assert_close(lens.log_prob[:, :, -1].T, theirs, atol=1e-5, rtol=1e-5)
