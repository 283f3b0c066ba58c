"""The claims of a causal check: that the model uses what the probe reads, one for each edit."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hooklens.plugins.probing.probe_use import EDITS, NULLS, CausalCheck
from hooklens.results.claims import ClaimFamily, Measured, Registration, claim, family

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


def causal_claims(
    check: CausalCheck, model: "HookedTransformer | str", metric: Any = "", *, registered: Sequence[Registration] = ()
) -> ClaimFamily:
    """The probe's accuracy as observation, each edit's effect as intervention, random directions as the control.

    The control is the 97.5 % quantile for the kind of random direction that changes the metric more.
    """
    group, made = check.group.cpu(), []
    seen = Measured.of("the probe is correct", check.read.cpu(), group)
    for i, edit in enumerate(EDITS):
        effect = Measured.of(f"fall of the metric, {edit}", check.fall[i].cpu(), group, metric=metric)
        edges = [
            Measured.edge_of(f"random directions, {null}", draws, group, metric=metric)
            for null, draws in zip(NULLS, check.random_fall[i].cpu(), strict=True)
        ]
        statement = f"what the probe reads at {check.point} is used ({edit})"
        furthest = max(edges, key=lambda edge: abs(edge.mean))
        made.append(claim(model, statement, observation=seen, intervention=effect, control=furthest))
    return family(model, made, registered=registered)
