"""The same numbers as TransformerLens 3.9.0's head detector and composition scores."""

import pytest
import torch
from model.parity import transformer_lens_model
from recorded_heads import COMPOSED, DETECTED, TOKENS

from hooklens.plugins.heads.composition import score_composition
from hooklens.plugins.heads.head_scores import key_masks
from hooklens.plugins.heads.rotations import mass


@pytest.mark.parametrize(("name", "kind"), DETECTED)
def test_the_share_of_attention_that_detect_head_finds(name, kind):
    model, tokens = transformer_lens_model(name), torch.tensor(TOKENS)
    mask = key_masks(tokens)[kind]
    if kind == "previous":
        mask = mask.clone()
        mask[:, 1, 0] = True  # there the first position counts
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, "pattern")
    # ours is a mean over the queries that have such a key, theirs a share of all attention, 1 a query
    share = mask.any(-1).sum() / tokens.shape[1]
    found = torch.stack([mass(cache["pattern", layer], mask)[0] for layer in range(2)]) * share
    torch.testing.assert_close(found, torch.tensor(DETECTED[name, kind]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "mode"), COMPOSED)
def test_the_composition_scores_of_folded_weights(name, mode):
    model = transformer_lens_model(name)
    found = score_composition(model, draws=2).scores[mode]
    expected = torch.tensor(COMPOSED[name, mode]).view_as(found)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
