"""Attention knockout is what a hooked forward pass with blocked scores gives."""

import pytest
import torch

from hooklens.core.errors import HooklensError
from hooklens.data.repeated import repeated_tokens
from hooklens.model.config import Softmax
from hooklens.plugins.heads.head_scores import key_masks
from hooklens.plugins.heads.knockout import KEPT, all_but, knock_out_keys, weakened
from hooklens.testing import induction_model, tiny_model

FAMILIES = {
    "learned": {},
    "rotary, grouped": {
        "n_heads": 4,
        "n_key_value_heads": 2,
        "positional_embedding_type": "rotary",
        "normalization_type": "RMS",
    },
    "sandwich, capped": {"block": "sandwich", "score_fn": Softmax(soft_cap=5.0)},
    "parallel": {"block": "parallel"},
    "post-norm": {"block": "post"},
    "linear attention": {"score_fn": "linear"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_run_in_which_a_hook_blocks_the_scores_of_one_head(family):
    model = tiny_model(dtype=torch.float64, **FAMILIES[family])
    text = repeated_tokens(model, 3)
    found = knock_out_keys(model, text.tokens, text.metric(), kind="previous")
    mask = key_masks(text.tokens)["previous"]

    for number, name in enumerate(found.heads):
        layer, head = (int(part) for part in name[1:].split("H"))

        def block(scores, hook, head=head):
            scores[:, head] = scores[:, head].masked_fill(mask, -torch.inf)
            return scores

        with torch.no_grad():
            logits = model.run_with_hooks(text.tokens, fwd_hooks=[(("attn_scores", layer), block)])
        expected = found.base_per_sequence - text.metric()(logits)
        torch.testing.assert_close(found.fall[:, number], expected, atol=1e-9, rtol=0)


def test_a_query_that_would_see_nothing_is_left_as_it_was():
    model, tokens = tiny_model(), torch.tensor([[1, 2, 3, 4]])
    everything = torch.ones(1, 4, 4, dtype=torch.bool)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, ["z", *KEPT])
        write = weakened(model, cache, all_but(everything, model))
        for layer in range(2):
            z = cache["z", layer]
            assert torch.equal(write(z, f"blocks.{layer}.attn.hook_z"), z)


def test_the_hand_set_heads_matter_and_the_idle_ones_do_not():
    model = induction_model()
    text = repeated_tokens(model, 6)
    falls = {
        kind: knock_out_keys(model, text.tokens, text.metric(), kind=kind).fall.mean(0)
        for kind in key_masks(text.tokens)
    }
    assert falls["previous"][0] > 1 and falls["induction"][3] > 1
    assert falls["previous"][1:].abs().max() < 1e-5 and falls["duplicate"].abs().max() < 1e-5
    assert falls["induction"][:3].abs().max() < 1e-5


def test_bad_input_says_what_would_work():
    model, text = tiny_model(), repeated_tokens(tiny_model(), 2)
    with pytest.raises(HooklensError, match="closest: induction"):
        knock_out_keys(model, text.tokens, text.metric(), kind="inducton")
    with pytest.raises(HooklensError, match="need \\[sequence query key\\]"):
        knock_out_keys(model, text.tokens, text.metric(), mask=torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(HooklensError, match="at least one"):
        knock_out_keys(model, text.tokens, text.metric(), heads=[])
    with pytest.raises(HooklensError, match="layers 0 to 1"):
        knock_out_keys(model, text.tokens, text.metric(), heads=[(9, 0)])
