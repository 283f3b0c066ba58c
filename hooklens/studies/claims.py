"""Claims: what was observed, what was changed, the effect compared with a control, and the resulting verdict."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.component import head_name
from hooklens.data.demo_prompts import demo_texts
from hooklens.metrics import loss
from hooklens.results.claims import ClaimFamily, Measured, claim, family

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


def zero_heads(
    model: "HookedTransformer", tokens: Int[Tensor, "prompt pos"], metric: Any, *, layer: int = 0
) -> ClaimFamily:
    """Does a head of this layer matter? Each is set to zero, and its effect is compared with the next head's.

    >>> from hooklens.testing import induction_model
    >>> model, tokens = induction_model(), torch.tensor([[3, 1, 4, 3, 1, 4]])
    >>> [one.statement for one in zero_heads(model, tokens, loss(model, tokens), layer=1).claims]
    ['L1H0 matters', 'L1H1 matters']
    """
    heads, site = range(model.cfg.n_heads), ("z", layer)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names=site)
        base, size = metric(logits), cache[site].norm(dim=-1).mean(1)  # prompt; prompt head
        fall = [base - metric(model.run_with_hooks(tokens, fwd_hooks=[(site, _zero(i))])) for i in heads]
    effect = [Measured.of("fall of the metric with the head at zero", one.cpu(), metric=metric) for one in fall]
    made = []
    for i in heads:
        other = fall[(i + 1) % len(fall)].cpu()
        seen = Measured.of("length of z", size[:, i].cpu())
        control = Measured.of("the same for the next head", other, metric=metric) if len(fall) > 1 else None
        matters = f"{head_name(layer, i)} matters"
        made.append(claim(model, matters, observation=seen, intervention=effect[i], control=control))
    return family(model, made)


def _zero(head: int) -> Any:
    def zero(z: Float[Tensor, "prompt pos head d_head"], hook: Any) -> Float[Tensor, "prompt pos head d_head"]:
        z[:, :, head] = 0
        return z

    return zero


def demo(model: "HookedTransformer") -> ClaimFamily:
    """Does a head of the first layer matter for the loss on six short prompts?"""
    tokens = demo_texts(model, 6, 8)
    return zero_heads(model, tokens, loss(model, tokens))
