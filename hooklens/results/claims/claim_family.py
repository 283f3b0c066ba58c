"""Claims that were tested together: each verdict corrects for the number of claims."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError, did_you_mean
from hooklens.results.claims.registration import Registration
from hooklens.results.claims.single_claim import Claim
from hooklens.results.result import Result, Table
from hooklens.results.statistics import q_values

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


@dataclass(frozen=True, eq=False)
class ClaimFamily(Result):
    """Claims tested together, each with its false discovery rate; made by `family`."""

    ranked_by = "verdict, then the smallest q"
    terms = {"control": "the same measurement without the claim's cause; each claim names its own"}

    claims: list[Claim]

    @property
    def q(self) -> Float[Tensor, "claim"]:
        """Benjamini-Hochberg q-values over all claims with an intervention; NaN for the others."""
        values = [torch.nan if claim.q is None else claim.q for claim in self.claims]
        return torch.tensor(values, dtype=torch.float64)

    def table(self, n: int | None = None) -> Table:
        """One row per claim, as in a report."""
        rows = []
        for claim in self.claims:
            effect = claim.intervention
            numbers = (None, None, None) if effect is None else (effect.mean, *effect.interval())
            control = None if claim.control is None else claim.control.mean
            rows.append((claim.statement, claim.status, claim.verdict, *numbers, control, claim.q))
        return Table(("claim", "status", "verdict", "effect", "low", "high", "control", "q"), rows).head(n)

    @property
    def ranking(self) -> Float[Tensor, "claim"]:
        """Causal claims first, and of both kinds the smallest q."""
        return 4.0 * torch.tensor([claim.causal for claim in self.claims]) - self.q.nan_to_num(2.0)

    def figure(self) -> Any:
        """Every effect with its interval."""
        from hooklens import viz

        shown = [claim for claim in self.claims if claim.intervention is not None] or self.claims
        effects = [claim.intervention or claim.observation for claim in shown]
        numbers = torch.tensor([(effect.mean, *effect.interval()) for effect in effects], dtype=torch.float64)
        mean, low, high = numbers.T
        return viz.bars(mean, low, high, [claim.statement for claim in shown], "Effects of the interventions")


def family(
    model: "HookedTransformer | str", claims: Sequence[Claim], *, registered: Sequence[Registration] = ()
) -> ClaimFamily:
    """Combine claims about one model that were tested together: each verdict then also requires q of at most 0.05.

    Registrations in `registered` are assigned to the claims whose statement is their hypothesis.

    >>> from hooklens.results.claims import Measured, claim
    >>> seen = Measured.of("seen", [1.0] * 6)
    >>> none, some = ([-0.1, 0.1] * 3, [2.0, 1.5, 1.8, 2.2, 1.9, 2.1])
    >>> claims = [
    ...     claim("a model", f"L0H{i} matters", observation=seen, intervention=Measured.of("effect", values),
    ...           control=Measured.of("control", [0.0] * 6))
    ...     for i, values in enumerate([some, none, none])
    ... ]
    >>> claims[0].verdict, family("a model", claims).claims[0].verdict      # q is 3 * 2 / 2^6
    ('causal', 'no causal effect shown')

    Reference: Benjamini and Hochberg (1995), "Controlling the False Discovery Rate", equation 1.
    """
    name = model if isinstance(model, str) else model.cfg.model_name
    wrong = sorted({claim.model for claim in claims} - {name})
    if not claims or wrong:
        raise InputError(f"a family needs at least one claim, and all must be about {name!r}; got {wrong or 'none'}")
    plans = {plan.hypothesis: plan for plan in registered}
    unmet = sorted(plans.keys() - {claim.statement for claim in claims})
    if unmet or len(plans) < len(registered):
        what = f"no claim states {unmet[0]!r}; one states {claims[0].statement!r}" if unmet else "two plans state one"
        raise InputError(f"each registered hypothesis must be the statement of one claim: {what}")
    planned = [replace(claim, registered=plans.get(claim.statement, claim.registered)) for claim in claims]
    q_of = q_values(torch.tensor([claim.p for claim in planned], dtype=torch.float64)).tolist()
    n = sum(claim.intervention is not None for claim in planned)
    q_or_none = [None if q != q else q for q in q_of]
    return ClaimFamily([replace(claim, q=q, n_tested=n) for claim, q in zip(planned, q_or_none, strict=True)])


def plans_met(claims: ClaimFamily | None, registered: Sequence[Registration]) -> tuple[list[Registration], list[str]]:
    """The plans whose hypothesis is the statement of a claim, and a sentence for each other plan: none is dropped.

    >>> plan = Registration("L5H1 moves names", "logit_diff", "other heads", threshold=0.5, n=64)
    >>> plans_met(None, [plan])[1]
    ["Plan unwritten ...: no result supports it, as no claim says 'L5H1 moves names'."]
    """
    statements = set() if claims is None else {claim.statement for claim in claims.claims}
    met = [plan for plan in registered if plan.hypothesis in statements]
    rest = [plan for plan in registered if plan.hypothesis not in statements]
    return met, [f"Plan {plan.dated}: no result supports it, as no claim says {plan.hypothesis!r}." for plan in rest]


def check_plans(registered: Sequence[Registration], statements: Collection[str]) -> None:
    """Raise for a plan whose hypothesis is none of the statements that a run can make, before the run."""
    for plan in registered:
        if plan.hypothesis not in statements:
            raise did_you_mean("claim of this run", plan.hypothesis, statements)
