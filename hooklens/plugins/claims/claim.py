"""Claims: an observation, an intervention, a control, an interval, and what may be said with those that are there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError, WrongType
from hooklens.plugins.claims.registration import Registration
from hooklens.result import Result, Table
from hooklens.statistics import group_numbers, mean_interval, q_values, sign_flip_p

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Measured(Result):
    """One number a prompt, and which prompts belong together: what was measured, in words."""

    what: str
    per_prompt: Float[Tensor, "prompt"]
    group: Int[Tensor, "prompt"]

    @classmethod
    def of(cls, what: str, per_prompt: Any, group: Any = None) -> "Measured":
        """From numbers or a tensor. Prompts of one group share something; without groups each is its own.

        >>> Measured.of("attention to the name", [0.5, 1.0]).mean
        0.75
        """
        values = torch.as_tensor(per_prompt).detach()
        values = values if values.is_floating_point() else values.double()
        if values.ndim != 1 or not len(values):
            raise InputError(f"{what!r} is one number a prompt, got shape {list(values.shape)}")
        if not bool(values.isfinite().all()):
            raise InputError(f"{what!r} is not finite for {int((~values.isfinite()).sum())} of {len(values)} prompts")
        return cls(what, values, group_numbers(len(values), None if group is None else torch.as_tensor(group)))

    @property
    def mean(self) -> float:
        return float(self.per_prompt.double().mean())

    @property
    def n_groups(self) -> int:
        """How many independent units there are."""
        return int(self.group.max()) + 1

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean over groups; NaN for a single group, which has none."""
        if self.n_groups < 2:
            return float("nan"), float("nan")
        low, high = mean_interval(self.per_prompt.double(), group=self.group, level=_LEVEL)
        return float(low), float(high)

    def beyond(self, control: "Measured") -> "Measured":
        """This minus the control, prompt by prompt."""
        if len(self.per_prompt) != len(control.per_prompt) or not torch.equal(self.group, control.group):
            raise InputError(
                f"{self.what!r} and its control {control.what!r} must be measured on the same prompts in the same "
                f"groups, got {len(self.per_prompt)} in {self.n_groups} and {len(control.per_prompt)} in "
                f"{control.n_groups}"
            )
        moved = self.per_prompt.double() - control.per_prompt.double()
        return Measured(f"{self.what}, minus {control.what}", moved, self.group)


@dataclass(frozen=True, eq=False)
class Claim(Result):
    """A statement about a model and the evidence for it. `causal` says whether it may be called that.

    `registered` is None where the statement was not written down before the run: it is then exploratory.
    """

    statement: str
    model: str
    observation: Measured
    intervention: Measured | None
    control: Measured | None
    registered: Registration | None

    @property
    def side(self) -> float:
        """1 where the effect should lie above 0, -1 below: as registered, else as it came out."""
        if self.registered is not None:
            return 1.0 if self.registered.side == "above" else -1.0
        effect = self.intervention
        return -1.0 if effect is not None and effect.mean < 0 else 1.0

    @property
    def lacks(self) -> list[str]:
        """What keeps the statement from being causal, in words; empty where nothing does."""
        if self.intervention is None:
            return ["nothing was intervened on: an observation alone is a correlation"]
        missing = [] if self.control is not None else ["the intervention has no control beside it"]
        if self.intervention.n_groups < 2:
            return [*missing, "the effect has no interval: it was measured on one independent group of prompts"]
        low, high = sorted(self.side * end for end in self.intervention.interval())
        least = 0.0 if self.registered is None else self.registered.threshold
        if not low > least:
            missing.append(f"the effect's interval [{low:.3g}, {high:.3g}] does not lie above {least:g}")
        if self.control is not None:
            low, high = sorted(self.side * end for end in self.intervention.beyond(self.control).interval())
            if not low > 0:
                missing.append(f"the effect does not exceed the control's: the difference is [{low:.3g}, {high:.3g}]")
        return missing + self._departures()

    def _departures(self) -> list[str]:
        """Where the run was another than the one that was registered."""
        plan = self.registered
        if plan is None or self.intervention is None:
            return []
        seen = [("hypothesis", plan.hypothesis, self.statement), ("n", plan.n, len(self.intervention.per_prompt))]
        if self.control is not None:
            seen.append(("control", plan.control, self.control.what))
        return [f"registered {name} {was!r}, but this is {now!r}" for name, was, now in seen if was != now]

    @property
    def causal(self) -> bool:
        """Is there an intervention whose effect has an interval off 0, and beyond that of its control?"""
        return not self.lacks

    @property
    def status(self) -> str:
        """ "registered" or "exploratory"."""
        return "exploratory" if self.registered is None else f"registered {self.registered.digest[:8]}"

    @property
    def verdict(self) -> str:
        """ "causal", "no causal effect shown" or "observed"."""
        if self.causal:
            return "causal"
        return "observed" if self.intervention is None else "no causal effect shown"

    @property
    def p(self) -> float:
        """Two-sided p-value of the effect (beyond its control where there is one); NaN without an intervention."""
        if self.intervention is None:
            return float("nan")
        tested = self.intervention if self.control is None else self.intervention.beyond(self.control)
        return float(sign_flip_p(tested.per_prompt.double(), group=tested.group))

    def require_causal(self) -> "Claim":
        """The claim itself, if it is causal; else an error that says what it lacks."""
        if not self.causal:
            raise InputError(f"{self.statement!r} cannot be called causal: {'; '.join(self.lacks)}")
        return self

    def sentence(self) -> str:
        """The claim as it may be said."""
        seen = _said(self.observation)
        said = [f"{self.statement} ({self.status}, {self.verdict}).", f"Seen: {seen}."]
        if self.intervention is not None:
            said.append(f"Intervention: {_said(self.intervention)}.")
        if self.control is not None:
            said.append(f"Control: {_said(self.control)}.")
        return " ".join(said + [f"Lacking: {'; '.join(self.lacks)}."] * bool(self.lacks))

    def table(self, n: int | None = None) -> Table:
        """One row a measurement."""
        rows = []
        for role in ("observation", "intervention", "control"):
            part = getattr(self, role)
            if part is not None:
                rows.append((role, part.what, part.mean, *part.interval(), len(part.per_prompt), part.n_groups))
        return Table(("role", "what", "mean", "low", "high", "prompts", "groups"), rows).head(n)

    def figure(self) -> Any:
        """The three means with their intervals."""
        from hooklens import viz

        rows = self.table().rows
        low, high = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (3, 4))
        means = torch.tensor([row[2] for row in rows], dtype=torch.float64)
        return viz.bars(means, low, high, [row[0] for row in rows], f"{self.statement}: {self.verdict}")


def claim(
    model: "HookedTransformer",
    statement: str,
    *,
    observation: Measured,
    intervention: Measured | None = None,
    control: Measured | None = None,
    registered: Registration | None = None,
) -> Claim:
    """What may be said about a model with this evidence? Without intervention, control and interval: not "causal".

    >>> from hooklens.testing import tiny_model
    >>> seen = Measured.of("attention to the name", [0.9, 0.8, 0.9, 0.7])
    >>> said = claim(tiny_model(), "L0H1 moves the name", observation=seen)
    >>> said.verdict, said.causal
    ('observed', False)
    >>> effect = Measured.of("fall of the logit difference, head ablated", [2.0, 1.5, 1.8, 2.2])
    >>> other = Measured.of("the same, another head of the layer", [0.1, 0.0, -0.1, 0.1])
    >>> claim(tiny_model(), "L0H1 moves the name", observation=seen, intervention=effect, control=other).verdict
    'causal'

    Reference: Pearl (2009), "Causality", chapter 1.3 (seeing and doing).
    """
    for name, part in (("observation", observation), ("intervention", intervention), ("control", control)):
        if not isinstance(part, Measured) and not (part is None and name != "observation"):
            raise WrongType(f"{name} is made with Measured.of(what, values), got {type(part).__name__}")
    if intervention is None and control is not None:
        raise InputError(f"a control ({control.what!r}) was given without the intervention that it controls")
    return Claim(statement, model.cfg.model_name, observation, intervention, control, registered)


@dataclass(frozen=True, eq=False)
class ClaimFamily(Result):
    """Claims that were tested together, with the false discovery rate at which each would be called."""

    claims: list[Claim]

    @property
    def q(self) -> Float[Tensor, "claim"]:
        """Benjamini-Hochberg q-values over all claims that intervene."""
        return q_values(torch.tensor([one.p for one in self.claims], dtype=torch.float64))

    def table(self, n: int | None = None) -> Table:
        """One row a claim, as a report shows it."""
        rows = []
        for one, q in zip(self.claims, self.q.tolist(), strict=True):
            effect = one.intervention
            ends = (None, None, None) if effect is None else (effect.mean, *effect.interval())
            control = None if one.control is None else one.control.mean
            rows.append((one.statement, one.status, one.verdict, *ends, control, None if q != q else q))
        return Table(("claim", "status", "verdict", "effect", "low", "high", "control", "q"), rows).head(n)

    def top(self, k: int = 10) -> Table:
        """The `k` claims with the smallest q."""
        order = sorted(range(len(self.claims)), key=lambda i: (float(self.q[i].nan_to_num(2.0)), i))
        rows = self.table().rows
        return Table(self.table().columns, [rows[i] for i in order[:k]])

    def figure(self) -> Any:
        """Every effect with its interval."""
        from hooklens import viz

        shown = [one for one in self.claims if one.intervention is not None] or self.claims
        parts = [one.intervention or one.observation for one in shown]
        ends = torch.tensor([part.interval() for part in parts], dtype=torch.float64)
        means = torch.tensor([part.mean for part in parts], dtype=torch.float64)
        names = [one.statement for one in shown]
        return viz.bars(means, ends[:, 0], ends[:, 1], names, "Effects of the interventions")


def _said(part: Measured) -> str:
    low, high = part.interval()
    ends = "no interval" if low != low else f"95 % [{low:.3g}, {high:.3g}]"
    return f"{part.what} {part.mean:.3g} ({ends}, {len(part.per_prompt)} prompts in {part.n_groups} groups)"


def family(model: "HookedTransformer", claims: Sequence[Claim]) -> ClaimFamily:
    """Claims about one model that were tested together: their q-values take all of them into account."""
    wrong = sorted({one.model for one in claims} - {model.cfg.model_name})
    if not claims or wrong:
        raise InputError(f"a family is of at least one claim about {model.cfg.model_name!r}, got {wrong or 'none'}")
    return ClaimFamily(list(claims))


def demo(model: "HookedTransformer") -> ClaimFamily:
    """Does a head of the first layer matter for the loss? Each zeroed on short prompts, the next one as its control."""
    from hooklens.metrics import loss
    from hooklens.plugins.patching.activation import patch
    from hooklens.sweeps.settings import engine

    n = min(8, model.cfg.n_ctx)
    tokens = torch.randint(model.cfg.d_vocab, (6, n), generator=torch.Generator().manual_seed(0)).to(model.device)
    with engine(progress=False, verify=0), torch.no_grad():
        sweep = patch(model, tokens, tokens, loss(model, tokens), site="z", value="zero")
        _, cache = model.run_with_cache(tokens, names=("z", 0))
    rose = sweep.clean_per_pair[:, None] - sweep.per_pair[:, 0]
    size = cache["z", 0].norm(dim=-1).mean(1)  # prompt head
    return family(model, [_of_head(model, rose, size, head) for head in range(rose.shape[1])])


def _of_head(
    model: "HookedTransformer", rose: Float[Tensor, "prompt head"], size: Float[Tensor, "prompt head"], head: int
) -> Claim:
    other = (head + 1) % rose.shape[1]
    return claim(
        model,
        f"L0H{head} matters",
        observation=Measured.of("length of z", size[:, head].cpu()),
        intervention=Measured.of("rise of the loss with the head at zero", rose[:, head].cpu()),
        control=None if other == head else Measured.of("the same for the next head", rose[:, other].cpu()),
    )
