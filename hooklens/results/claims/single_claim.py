"""A claim: an observation, an intervention, a control, an interval, and the verdict that the available ones support."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from hooklens.core.errors import InputError, WrongType, did_you_mean
from hooklens.results.claims.measured import Measured
from hooklens.results.claims.registration import SIDES, Registration
from hooklens.results.result import Result, Table
from hooklens.results.statistics import LEAST_GROUPS

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

LARGEST_P = 0.05


@dataclass(frozen=True, eq=False)
class Claim(Result):
    """A statement about a model and the evidence for it. `causal` says whether the evidence supports this word.

    `registered` is None if the statement was not written down before the run: it is then exploratory. `q` is None
    unless the claim was tested together with others (`family`), `n_tested` in total; the verdict then requires q as
    well. `claimed` is the sign of the effect according to the statement, "above" or "below" 0; "" if it has none.
    """

    statement: str
    model: str
    observation: Measured
    intervention: Measured | None
    control: Measured | None
    registered: Registration | None
    q: float | None = None
    n_tested: int = 1
    claimed: str = ""

    @property
    def side(self) -> float:
        """1 if the effect should lie above 0, -1 if below: as registered, else as claimed, else as measured."""
        side = self.claimed if self.registered is None else self.registered.side
        if not side:
            side = "below" if self.intervention is not None and self.intervention.mean < 0 else "above"
        return 1.0 if side == "above" else -1.0

    @property
    def least(self) -> float:
        """How far from 0 the effect must lie: the registered threshold, else 0."""
        return 0.0 if self.registered is None else self.registered.threshold

    @cached_property
    def beyond(self) -> list[Measured]:
        """The effect minus that of the control, and plus it, prompt by prompt; empty without a control.

        The effect is larger in size than the control's if both lie on its side. A control that changes the metric more
        in the other direction satisfies the first condition but not the second.
        """
        effect, control = self.intervention, self.control
        if effect is None or control is None:
            return []
        return [effect.beyond(control), effect.beyond(control, mirrored=True)]

    @cached_property
    def p(self) -> float:
        """Two-sided p-value: the larger of the effect's beyond `least` and of its size beyond that of its control.

        NaN without an intervention; that of the effect alone without a control.
        """
        if self.intervention is None:
            return float("nan")
        return max([self.intervention.p(self.side * self.least), *(excess.p() for excess in self.beyond)])

    @cached_property
    def lacks(self) -> list[str]:
        """The reasons why the statement is not causal, in words; empty if there are none."""
        if self.intervention is None:
            return ["there was no intervention: an observation alone is a correlation", *self.departures]
        missing = [] if self.control is not None else ["the intervention has no control"]
        n = self.intervention.n_groups
        if n < 2:
            only = "the effect has no interval: it was measured on one independent group of prompts"
            return [*missing, only, *self.departures]
        low, high = self._least_interval([self.intervention])
        if not low > self.least:
            missing.append(f"the effect's interval [{low:.3g}, {high:.3g}] does not lie above {self.least:g}")
        if self.beyond:
            low, high = self._least_interval(self.beyond)
            if not low > 0:
                missing.append(f"the effect does not exceed the control's in size: difference [{low:.3g}, {high:.3g}]")
        if n < LEAST_GROUPS:
            missing.append(f"{n} groups of prompts cannot give p < {2 / 2**n:.3g}; at least {LEAST_GROUPS} are needed")
        elif self.p > LARGEST_P:
            missing.append(f"p is {self.p:.3g}, above {LARGEST_P:g}")
        if self.q is not None and self.p <= LARGEST_P < self.q:
            missing.append(f"q is {self.q:.3g} over the {self.n_tested} claims tested together, above {LARGEST_P:g}")
        return missing + self.departures

    def _least_interval(self, parts: list[Measured]) -> list[float]:
        """The percentile or studentised interval of these that is least favourable to the claim."""
        ends = [pair for part in parts for pair in (part.interval(), part.studentised())]
        return min(sorted(self.side * end for end in pair) for pair in ends)

    @cached_property
    def departures(self) -> list[str]:
        """The differences between the run and the registered plan; empty if nothing was registered."""
        plan, effect = self.registered, self.intervention
        if plan is None:
            return []
        seen: list[tuple[str, Any, Any]] = [
            ("hypothesis", plan.hypothesis, self.statement),
            ("model", plan.model or self.model, self.model),
            ("metric", plan.metric, None if effect is None else effect.metric or None),
            ("n", plan.n, None if effect is None else len(effect.per_prompt)),
            ("control", plan.control, None if self.control is None else self.control.what),
        ]
        unwritten = [] if plan.written else ["the plan was not written to a file before the run"]
        return unwritten + [f"registered {name} {was!r}, but this is {now!r}" for name, was, now in seen if was != now]

    @property
    def causal(self) -> bool:
        """Is there an intervention whose effect differs from 0 and exceeds that of its control, with confidence?"""
        return not self.lacks

    @property
    def status(self) -> str:
        """ "exploratory", "self-dated" or "registered", with the author's time and the first digits of the digest.

        Self-dated: the time of the plan rests on its author's clock only; the plan was not compared with a published
        digest.
        """
        if self.registered is None:
            return "exploratory"
        if self.departures:
            return f"exploratory, departs from the plan {self.registered.digest[:8]}"
        return self.registered.dated

    @property
    def opposite(self) -> bool:
        """Whether the effect lies on the opposite side of 0, with its whole interval, p and q."""
        effect = self.intervention
        if effect is None or effect.n_groups < LEAST_GROUPS:
            return False
        beyond = max(self.side * end for end in (*effect.interval(), *effect.studentised())) < 0
        return beyond and effect.p() <= LARGEST_P and (self.q is None or self.q <= LARGEST_P)

    @property
    def verdict(self) -> str:
        """ "causal", "opposite effect", "no causal effect shown" or "observed"."""
        if self.causal:
            return "causal"
        if self.opposite:
            return "opposite effect"
        return "observed" if self.intervention is None else "no causal effect shown"

    def require_causal(self) -> "Claim":
        """Return the claim if it is causal; else raise an error that lists what is missing."""
        if not self.causal:
            raise InputError(f"{self.statement!r} cannot be called causal: {'; '.join(self.lacks)}")
        return self

    def sentence(self) -> str:
        """The claim in words, no stronger than its evidence."""
        parts = [f"{self.statement} ({self.status}; {self.verdict}).", f"Seen: {self.observation.said()}."]
        if self.intervention is not None:
            parts.append(f"Intervention: {self.intervention.said()}.")
        if self.control is not None:
            parts.append(f"Control: {self.control.said()}.")
        if self.lacks:
            parts.append(f"Lacking: {'; '.join(self.lacks)}.")
        return " ".join(parts)

    def table(self, n: int | None = None) -> Table:
        """One row per measurement."""
        rows = []
        for role in ("observation", "intervention", "control"):
            part = getattr(self, role)
            if part is not None:
                ends = (*part.interval(), *part.studentised())
                rows.append((role, part.what, part.mean, *ends, len(part.per_prompt), part.n_groups))
        numbers = ("mean", "95% low", "95% high", "studentised 98% low", "98% high", "prompts", "groups")
        return Table(("role", "what", *numbers), rows).head(n)

    def figure(self) -> Any:
        """The three means with their intervals."""
        from hooklens import viz

        rows = self.table().rows
        mean, low, high = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (2, 3, 4))
        return viz.bars(mean, low, high, [row[0] for row in rows], f"{self.statement}: {self.verdict}")


def claim(
    model: "HookedTransformer | str",
    statement: str,
    *,
    observation: Measured,
    intervention: Measured | None = None,
    control: Measured | None = None,
    registered: Registration | None = None,
    side: str = "",
) -> Claim:
    """What does this evidence show about a model (or its name)? The verdict is "causal" only if all of it is there.

    >>> from hooklens.testing import tiny_model
    >>> seen = Measured.of("attention to the name", [0.9, 0.8, 0.9, 0.7, 0.9, 0.8])
    >>> observed = claim(tiny_model(), "L0H1 moves the name", observation=seen)
    >>> observed.verdict, observed.causal
    ('observed', False)
    >>> effect = Measured.of("fall of the logit difference, head ablated", [2.0, 1.5, 1.8, 2.2, 1.9, 2.1])
    >>> other = Measured.of("the same, another head of the layer", [0.1, 0.0, -0.1, 0.1, 0.0, 0.1])
    >>> claim(tiny_model(), "L0H1 moves the name", observation=seen, intervention=effect, control=other).verdict
    'causal'

    A causal claim needs an intervention with a control on the same prompts; intervals of the effect, and of the excess
    of its size over the control's, that lie on the side of the effect (95 % percentile and 98 % studentised intervals);
    and p-values (sign flips of groups) of at most 0.05, which need at least 6 groups.

    `side` is "above" or "below" if the statement gives the sign of the effect: a significant effect with the other sign
    has the verdict "opposite effect". Without `side` the effect's own sign is used.

    Reference: Pearl (2009), "Causality", chapter 1.3 (seeing and doing).
    """
    for name, part in (("observation", observation), ("intervention", intervention), ("control", control)):
        if not isinstance(part, Measured) and not (part is None and name != "observation"):
            raise WrongType(f"{name} must be made with Measured.of(what, values), got {type(part).__name__}")
    if intervention is None and control is not None:
        raise InputError(f"a control ({control.what!r}) was given without an intervention")
    if side and side not in SIDES:
        raise did_you_mean("side", side, SIDES)
    name = model if isinstance(model, str) else model.cfg.model_name
    return Claim(
        statement=statement,
        model=name,
        observation=observation,
        intervention=intervention,
        control=control,
        registered=registered,
        claimed=side,
    )
