"""The largest of many effects is too large: choose on one half of the prompts, report on the other."""

from typing import TYPE_CHECKING

from hooklens.data.demo_prompts import demo_texts
from hooklens.metrics import loss
from hooklens.plugins.patching.activation import patch
from hooklens.results.claims import HeldOutEffects, held_out_top
from hooklens.sweeps.settings import engine

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


def demo(model: "HookedTransformer") -> HeldOutEffects:
    """Which head's zeroing changes the loss most? Chosen on half of twelve short prompts, reported on the rest."""
    tokens = demo_texts(model, 12, 8)
    with engine(progress=False, verify=0):
        sweep = patch(model, tokens, tokens, loss(model, tokens), site="z", value="zero")
    rose = sweep.clean_per_pair[:, None, None] - sweep.per_pair
    names = [f"L{i}H{j}" for i in range(model.cfg.n_layers) for j in range(model.cfg.n_heads)]
    return held_out_top(model, rose, names, k=min(4, len(names)))
