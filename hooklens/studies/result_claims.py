"""The claims that results of other methods support: name movers, the taxonomy of heads, probes and steering."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from torch import Tensor

from hooklens.core.component import head_name
from hooklens.core.errors import InputError
from hooklens.data.repeated import MinusRepeatLoss
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.head_labels import Taxonomy
from hooklens.plugins.heads.head_scores import LABELS
from hooklens.plugins.heads.mover_result import NameMovers, of_pairs
from hooklens.plugins.probing.probe_use import EDITS, NULLS, CausalCheck
from hooklens.plugins.steering.coefficient_result import CoefficientSweep
from hooklens.results import statistics
from hooklens.results.claims import Claim, ClaimFamily, Measured, Registration, claim, family

LEAST_GROUPS = 2 * statistics.LEAST_GROUPS  # with fewer, no name mover could be called causal on the reported half
_METRIC = "logit_diff"  # the metric of NameMovers.direct


def mover_claims(
    model: HookedTransformer, movers: NameMovers, *, registered: Sequence[Registration] = (), seed: int = 0
) -> ClaimFamily | None:
    """One claim for each head that one half of the pairs labels a name mover, measured on the other half.

    The intervention is the exact direct effect, as a share of the clean-corrupted difference. Its control uses the same
    head's clean output from another pair with other names: the effect of no longer writing the wrong name, or of
    writing any name. None if no head was labelled.

    Registrations in `registered` are compared with the claim of the same hypothesis, such as "L5H1 moves the name".
    """
    n_groups = len(movers.group.unique())
    if n_groups < LEAST_GROUPS:
        raise InputError(
            f"two halves of {statistics.LEAST_GROUPS} groups of pairs need {LEAST_GROUPS}, got {n_groups}; with fewer, "
            "no p can reach 0.05. A group is four pairs that share names and sentence"
        )
    named, reported = (of_pairs(movers, half) for half in movers.halves(seed=seed))
    claims = [_mover_claim(model, reported, head) for head in named.name_movers]
    return family(model, claims, registered=registered) if claims else None


def _mover_claim(model: HookedTransformer, movers: NameMovers, head: tuple[int, int]) -> Claim:
    layer, number = head
    share, placebo = ((moved / movers.gap.mean())[:, layer, number] for moved in (movers.direct, movers.placebo))
    other_pair, group = "the same head's output from a pair with other names", movers.group
    return claim(
        model,
        f"{head_name(layer, number)} moves the name",
        observation=Measured.of("attention to the indirect object", movers.attention[:, layer, number], group),
        intervention=Measured.of("share restored directly", share, group, metric=_METRIC),
        control=Measured.of(other_pair, placebo, group, metric=_METRIC),
        side="above",
    )


def taxonomy_claims(
    taxonomy: Taxonomy, model: HookedTransformer | str = "this model", *, registered: Sequence[Registration] = ()
) -> ClaimFamily | None:
    """Attention as observation, blocking it as intervention, taking as much from other keys as the control.

    Heads and labels were chosen by their scores, on other sequences than those of the effects. None if no score passed.
    If the control could take less than half as much attention, there is no control, and the claim is not causal.
    """
    passed = (taxonomy.score_q.cpu() <= taxonomy.alpha) & taxonomy.effect[0].cpu().isfinite()
    claims = [_taxonomy_claim(model, taxonomy, *index) for index in passed.nonzero().tolist()]
    return family(model, claims, registered=registered) if claims else None


def _taxonomy_claim(model: Any, taxonomy: Taxonomy, label: int, layer: int, head: int) -> Claim:
    name, (kind, sign) = list(LABELS.items())[label]
    change = "rise" if sign > 0 else "fall"

    def measured(what: str, values: Tensor) -> Measured | None:
        changes = sign * values[:, label, layer, head]
        return Measured.of(what, changes, metric=MinusRepeatLoss) if bool(changes.isfinite().all()) else None

    seen = taxonomy.scores.scores[kind][:, layer, head]
    blocked, control = f"{change} of the loss, these keys blocked", None
    if bool(taxonomy.unmatched[label, layer, head]):
        share = float(taxonomy.matched[label, layer, head])
        blocked += f" (no matched control: its other keys have only {share:.0%} of that attention)"
    else:
        control = measured(f"{change} of the loss, as much attention taken from others", taxonomy.placebo)
    return claim(
        model,
        _head_statement(name, layer, head),
        observation=Measured.of(f"attention to {kind} keys", seen[seen.isfinite()]),
        intervention=measured(blocked, taxonomy.effect),
        control=control,
        side="above",
    )


def _head_statement(label: str, layer: int, head: int) -> str:
    return f"{head_name(layer, head)} is {'an' if label[0] in 'aeiou' else 'a'} {label} head"


def head_statements(model: HookedTransformer) -> list[str]:
    """Every statement that `taxonomy_claims` can make about this model."""
    places = product(LABELS, range(model.cfg.n_layers), range(model.cfg.n_heads))
    return [_head_statement(*place) for place in places]


def causal_claims(
    check: CausalCheck, model: HookedTransformer | str, metric: Any = "", *, registered: Sequence[Registration] = ()
) -> ClaimFamily:
    """One claim for each edit: that the model uses what the probe reads.

    The probe's accuracy is the observation, the edit's effect the intervention. The control is the 97.5 % quantile for
    the kind of random direction that changes the metric more.
    """
    claims = []
    for i, edit in enumerate(EDITS):
        edges = [
            Measured.edge_of(f"random directions, {null}", draws, check.group, metric=metric)
            for null, draws in zip(NULLS, check.random_fall[i], strict=True)
        ]
        probe_claim = claim(
            model,
            f"what the probe reads at {check.point} is used ({edit})",
            observation=Measured.of("the probe is correct", check.read, check.group),
            intervention=Measured.of(f"fall of the metric, {edit}", check.fall[i], check.group, metric=metric),
            control=max(edges, key=lambda edge: abs(edge.mean)),
        )
        claims.append(probe_claim)
    return family(model, claims, registered=registered)


def steering_claims(
    sweep: CoefficientSweep,
    model: HookedTransformer | str,
    metric: Any = "",
    *,
    registered: Sequence[Registration] = (),
) -> ClaimFamily:
    """One claim per coefficient except 0: that steering changes the metric, compared with random directions."""
    base, group, claims = sweep.base_per_prompt, sweep.group, []
    for i in sweep.coefficients.nonzero().flatten().tolist():
        moved, random = sweep.metric[i] - base, sweep.random_metric[:, i] - base
        coefficient_claim = claim(
            model,
            f"{float(sweep.coefficients[i]):g} times the direction at {sweep.site} moves the metric",
            observation=Measured.of("metric, not steered", base, group, metric=metric),
            intervention=Measured.of("change of the metric", moved, group, metric=metric),
            control=Measured.edge_of("random directions of its length", random, group, metric=metric),
        )
        claims.append(coefficient_claim)
    return family(model, claims, registered=registered)
