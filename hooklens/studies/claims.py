"""Claims about heads that are set to zero, each compared with the next head of its layer."""

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from hooklens.core.component import head_name
from hooklens.data.demo_prompts import demo_texts
from hooklens.data.prompts import reads_vectors
from hooklens.metrics import loss, prediction
from hooklens.model.transformer import HookedTransformer
from hooklens.results.claims import ClaimFamily, Measured, claim, family


def zero_heads(
    model: HookedTransformer, tokens: Shaped[Tensor, "prompt pos *d_in"], metric: Any, *, layer: int = 0
) -> ClaimFamily:
    """Does a head of this layer matter? Each is set to zero, and its effect is compared with the next head's.

    >>> from hooklens.testing import induction_model
    >>> model, tokens = induction_model(), torch.tensor([[3, 1, 4, 3, 1, 4]])
    >>> [one.statement for one in zero_heads(model, tokens, loss(model, tokens), layer=1).claims]
    ['L1H0 matters', 'L1H1 matters']
    """
    n, site = model.cfg.n_heads, ("z", layer)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names=site)
        base, size = metric(logits), cache[site].norm(dim=-1).mean(1)  # prompt; prompt head
        fall = []
        for head in range(n):
            without = model.run_with_hooks(tokens, fwd_hooks=[(site, _zero(head))])
            fall.append(base - metric(without))
    claims = []
    for head in range(n):
        other = fall[(head + 1) % n]
        head_claim = claim(
            model,
            f"{head_name(layer, head)} matters",
            observation=Measured.of("length of z", size[:, head]),
            intervention=Measured.of("fall of the metric with the head at zero", fall[head], metric=metric),
            control=Measured.of("the same for the next head", other, metric=metric) if n > 1 else None,
        )
        claims.append(head_claim)
    return family(model, claims)


def _zero(head: int) -> Any:
    return lambda z, hook: z.index_fill(2, torch.tensor([head], device=z.device), 0.0)


def demo(model: HookedTransformer) -> ClaimFamily:
    """Does a head of the first layer matter for the loss on six short prompts, or for the prediction on vectors?"""
    tokens = demo_texts(model, 6, 8)
    return zero_heads(model, tokens, prediction(model) if reads_vectors(model) else loss(model, tokens))
