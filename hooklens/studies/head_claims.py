"""The claims of a taxonomy: one for each head and label whose score passed, with effects from other sequences."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hooklens.core.component import head_name
from hooklens.data.repeated import MinusRepeatLoss
from hooklens.plugins.heads.head_labels import Taxonomy
from hooklens.plugins.heads.head_scores import LABELS
from hooklens.results.claims import Claim, ClaimFamily, Measured, Registration, claim, family

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


def taxonomy_claims(
    found: Taxonomy, model: "HookedTransformer | str" = "this model", *, registered: Sequence[Registration] = ()
) -> ClaimFamily | None:
    """Attention as observation, blocking it as intervention, taking as much from other keys as the control.

    Heads and labels were chosen by their scores, on other sequences than those of the effects. None if no score passed.
    If the control could take less than half as much attention, there is no control, and the claim is not causal.
    """
    passed = (found.score_q.cpu() <= found.alpha) & found.effect[0].cpu().isfinite()
    made = [_claim(model, found, *index) for index in passed.nonzero().tolist()]
    return family(model, made, registered=registered) if made else None


def _claim(model: Any, found: Taxonomy, label: int, layer: int, head: int) -> Claim:
    name, (kind, sign) = list(LABELS)[label], list(LABELS.values())[label]
    raises = "rise" if sign > 0 else "fall"

    def of(what: str, values: Tensor) -> Measured | None:
        one = sign * values[:, label, layer, head].cpu()
        return Measured.of(what, one, metric=MinusRepeatLoss) if bool(one.isfinite().all()) else None

    seen = found.scores.scores[kind][:, layer, head].cpu()
    blocked, control = f"{raises} of the loss, these keys blocked", None
    if bool(found.unmatched[label, layer, head]):
        share = float(found.matched[label, layer, head])
        blocked += f" (no matched control: its other keys have only {share:.0%} of that attention)"
    else:
        control = of(f"{raises} of the loss, as much attention taken from others", found.placebo)
    return claim(
        model,
        f"{head_name(layer, head)} is {'an' if name[0] in 'aeiou' else 'a'} {name} head",
        observation=Measured.of(f"attention to {kind} keys", seen[seen.isfinite()]),
        intervention=of(blocked, found.effect),
        control=control,
        side="above",
    )
