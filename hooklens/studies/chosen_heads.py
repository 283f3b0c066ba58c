"""The largest of many effects is biased upwards: choose on one half of the prompts, report on the other."""

from typing import Any

from hooklens.data.demo_prompts import demo_texts
from hooklens.data.prompts import Prompts, reads_vectors
from hooklens.metrics import loss, prediction
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.ablation import ablate
from hooklens.results.claims import HeldOutEffects
from hooklens.sweeps.settings import engine


def choose_heads(model: HookedTransformer, tokens: Prompts, metric: Any, *, k: int = 4) -> HeldOutEffects:
    """Which `k` heads does the metric need most? Chosen on half of the prompts by zeroing, reported on the others.

    >>> from hooklens.testing import induction_model
    >>> model, tokens = induction_model(), [[3, 1, 4, 3], [5, 2, 6, 5], [7, 9, 8, 7], [2, 3, 5, 2]]
    >>> choose_heads(model, tokens, loss(model, tokens), k=2).names
    ['L1H1', 'L0H0']
    """
    sweep = ablate(model, tokens, metric, value="zero")
    return sweep.held_out_top(k)


def demo(model: HookedTransformer) -> HeldOutEffects:
    """Which heads change the loss most when set to zero? Chosen on half of twelve prompts, reported on the rest.

    For a model that reads vectors, the prediction takes the place of the loss.
    """
    tokens = demo_texts(model, 12, 8)
    with engine(progress=False, verify=0):
        metric = prediction(model) if reads_vectors(model) else loss(model, tokens)
        return choose_heads(model, tokens, metric, k=min(4, model.cfg.n_layers * model.cfg.n_heads))
