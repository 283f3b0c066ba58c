"""The claims of a coefficient sweep: that steering changes the metric, one for each coefficient."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hooklens.plugins.steering.coefficient_result import CoefficientSweep
from hooklens.results.claims import ClaimFamily, Measured, Registration, claim, family

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


def steering_claims(
    found: CoefficientSweep,
    model: "HookedTransformer | str",
    metric: Any = "",
    *,
    registered: Sequence[Registration] = (),
) -> ClaimFamily:
    """One claim per coefficient except 0: that steering changes the metric, compared with random directions."""

    base, group, made = found.base_per_prompt.cpu(), found.group.cpu(), []
    seen = Measured.of("metric, not steered", base, group, metric=metric)
    for i in found.coefficients.nonzero().flatten().tolist():
        moved, random = found.metric[i].cpu() - base, found.random_metric[:, i].cpu() - base
        effect = Measured.of("change of the metric", moved, group, metric=metric)
        control = Measured.edge_of("random directions of its length", random, group, metric=metric)
        words = f"{float(found.coefficients[i]):g} times the direction at {found.site} moves the metric"
        made.append(claim(model, words, observation=seen, intervention=effect, control=control))
    return family(model, made, registered=registered)
