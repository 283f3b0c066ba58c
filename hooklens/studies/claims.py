"""Claims: what was seen, what was changed, what happened beside a control, and what may be said of it."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.data.demo_prompts import demo_texts
from hooklens.metrics import loss
from hooklens.results.claims import ClaimFamily, Measured, claim, family

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


def demo(model: "HookedTransformer") -> ClaimFamily:
    """Does a head of the first layer matter for the loss? Each zeroed on short prompts, the next one as its control."""
    tokens, heads = demo_texts(model, 6, 8), range(model.cfg.n_heads)
    metric = loss(model, tokens)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names=("z", 0))
        base, size = metric(logits), cache["z", 0].norm(dim=-1).mean(1)  # prompt; prompt head
        rise = [base - metric(model.run_with_hooks(tokens, fwd_hooks=[(("z", 0), _zero(i))])) for i in heads]
    effect = [Measured.of("rise of the loss with the head at zero", one.cpu(), metric=metric) for one in rise]
    made = []
    for i in heads:
        other = rise[(i + 1) % len(rise)].cpu()
        seen = Measured.of("length of z", size[:, i].cpu())
        control = Measured.of("the same for the next head", other, metric=metric) if len(rise) > 1 else None
        made.append(claim(model, f"L0H{i} matters", observation=seen, intervention=effect[i], control=control))
    return family(model, made)


def _zero(head: int) -> Any:
    def zero(z: Float[Tensor, "prompt pos head d_head"], hook: Any) -> Float[Tensor, "prompt pos head d_head"]:
        z[:, :, head] = 0
        return z

    return zero
