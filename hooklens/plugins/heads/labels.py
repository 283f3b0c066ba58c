"""What the evidence allows each head to be called, and the rows that show it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.plugins.heads.copy_suppression import CopySuppression
from hooklens.plugins.heads.copying import Copying
from hooklens.plugins.heads.evidence import attention_map, label_rows
from hooklens.plugins.heads.named import NAME_LABELS, NameEvidence
from hooklens.plugins.heads.previous_token import PositionScores
from hooklens.plugins.heads.scores import LABELS, HeadScores
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, q_values, sign_flip_p

if TYPE_CHECKING:
    pass

UNLABELLED = "unlabelled"
#: Of the loss: an effect of less is detectable, and negligible.
LEAST_SHARE = 0.01
#: Of the attention that was blocked: a placebo that takes less is no matched control.
LEAST_MATCH = 0.5
PerLabel = Float[Tensor, "label layer head"]


@dataclass(frozen=True, eq=False)
class Taxonomy(Result):
    """Every head's evidence for every label, and the labels that it allows.

    `score_p` is the null model's: the share of randomly rotated heads that score as high (for copy suppression, the
    larger of that and the OV's). `effect` is the rise of the loss, in nats a token, on other repeated sequences when
    the head may not look at the label's keys: NaN where the score did not pass, for then it was not measured.
    `placebo` is the rise when as much attention is taken from its other keys: NaN also where the effect on its own is
    not off 0. `blocked` is the attention that was taken for each of the two: a head that gives its label's keys more
    than half of its attention has less elsewhere for the placebo to take (see `matched`). `names` is the
    evidence of indirect-object prompts, `positions` what positions alone do to queries and keys, `suppression` what the
    heads called copy suppression or negative name mover do to the token that they look at and to calibration; None
    where the model could not be asked, or no head was called so. `note` says why, or which pairs label name movers.
    """

    ranked_by = "strength of the evidence"

    terms = {
        "head": "L5H1 is head 1 of layer 5",
        "label": "the name that it earned, else the nearest, with a question mark",
        "score": "mean attention to the label's keys, of names the margin over any other position",
        "q": "of the score, the rate of false discoveries over all heads and labels",
        "effect": "rise of the loss in nats a token when the head may not attend to these keys (of names: the share of "
        "the logit difference that it restores directly)",
        "low": "lower end of the effect's 95 % interval over sequences",
        "high": "its upper end",
        "q of effect": "the same rate of the effect, over those measured",
        "share of loss": "the effect as a share of the loss",
        "placebo": "the rise when as much attention is taken from its other keys, the control",
        "placebo took": "the attention that the placebo took, as a share of what was blocked: where other keys hold "
        "less there is no more to take, and under half is no matched control",
        "rests": "mean attention to the first token, where heads attend that do nothing",
        "by position": "share of queries that positions alone would send to the previous token",
        "anti-copy": "what the head takes from the logit of the token attended to, beyond that of another token",
        "ECE change": "rise of the expected calibration error, the mean gap between confidence and accuracy, without "
        "the head",
    }

    scores: HeadScores
    ov: Copying
    score_p: Float[Tensor, "label layer head"]
    effect: Float[Tensor, "sequence label layer head"]
    placebo: Float[Tensor, "sequence label layer head"]
    loss: Float[Tensor, "sequence"]
    names: NameEvidence | None
    note: str
    alpha: float
    positions: PositionScores | None = None
    suppression: CopySuppression | None = None
    blocked: Float[Tensor, "keys label layer head"] | None = None

    @property
    def score_q(self) -> Float[Tensor, "label layer head"]:
        """Benjamini-Hochberg over all heads and labels."""
        return q_values(self.score_p)

    @property
    def effect_q(self) -> Float[Tensor, "label layer head"]:
        """Benjamini-Hochberg over the effects that were measured: those whose score passed, on other sequences."""
        p = sign_flip_p(self.effect.nan_to_num())
        return q_values(torch.where(self.effect[0].isnan(), torch.nan, p))

    def interval(self) -> tuple[PerLabel, PerLabel]:
        """Both ends of the mean effect, by a bootstrap over sequences, at 1 - `alpha`."""
        return self._interval(self.effect)

    def _interval(self, values: Float[Tensor, "sequence label layer head"]) -> tuple[PerLabel, PerLabel]:
        low, high = mean_interval(values.nan_to_num(), level=1 - self.alpha)
        missing = values[0].isnan()
        return low.masked_fill(missing, torch.nan), high.masked_fill(missing, torch.nan)

    @property
    def candidates(self) -> Bool[Tensor, "label layer head"]:
        """Where the score passes, and the effect's interval and q-value exclude 0 on the side that the label claims."""
        low, _ = self._interval(signs(self.effect) * self.effect)
        return (self.score_q <= self.alpha) & (low > 0) & (self.effect_q <= self.alpha)

    @property
    def opposite(self) -> Bool[Tensor, "label layer head"]:
        """Where the score passes, and the effect's interval and q-value exclude 0 on the other side."""
        _, high = self._interval(signs(self.effect) * self.effect)
        return (self.score_q <= self.alpha) & (high < 0) & (self.effect_q <= self.alpha)

    @property
    def share(self) -> Float[Tensor, "label layer head"]:
        """The effect's size: as a share of the loss of the repeated tokens, in the untouched run."""
        return self.effect.mean(0) / self.loss.mean()

    @property
    def negligible(self) -> Bool[Tensor, "label layer head"]:
        """Where the label is earned by an effect that is surely there, and less than 1 % of the loss."""
        return self.passes & (self.share.abs() < LEAST_SHARE)

    @property
    def matched(self) -> Float[Tensor, "label layer head"]:
        """The attention that the placebo took, as a share of what was blocked; NaN where neither was asked for."""
        if self.blocked is None:
            return torch.full_like(self.score_p, torch.nan)
        return self.blocked[1] / self.blocked[0]

    @property
    def unmatched(self) -> Bool[Tensor, "label layer head"]:
        """Where the placebo took less than half: the effect has no control that could have shown as much."""
        return self.matched < LEAST_MATCH

    @property
    def passes(self) -> Bool[Tensor, "label layer head"]:
        """Where a candidate's effect also exceeds its placebo, with an interval of the difference that excludes 0."""
        above_placebo, _ = self._interval(signs(self.effect) * (self.effect - self.placebo))
        return self.candidates & (above_placebo > 0)

    def called(self) -> dict[tuple[int, int], list[str]]:
        """The labels of each labelled head: of those of repeated tokens that of the largest effect, then of names."""
        mean = torch.where(self.passes, self.effect.mean(0).abs(), -1.0)
        best, which = mean.max(0)
        kinds, found = list(LABELS), {}
        for layer, head in (best >= 0).nonzero().tolist():
            found[layer, head] = [kinds[int(which[layer, head])]]
        named = {} if self.names is None else self.names.labelled(self.alpha)
        for label, heads in named.items():
            for at in heads:
                found.setdefault(at, []).append(label)
        return found

    def labels(self) -> list[list[str]]:
        """What each head of each layer is called."""
        called, (n_layers, n_heads) = self.called(), self.score_p.shape[1:]
        return [
            [", ".join(called.get((layer, head), [UNLABELLED])) for head in range(n_heads)] for layer in range(n_layers)
        ]

    def counts(self) -> Table:
        """How many heads each label has, and how many had the score but not the effect, or the opposite one."""
        flat = [label for labels in self.called().values() for label in labels]
        scored = self.score_q <= self.alpha
        unmatched = self.passes & self.unmatched.to(scored.device)
        parts = (scored, scored & ~self.passes & ~self.opposite, self.opposite, self.negligible, unmatched)
        sums = [one.flatten(1).sum(1).tolist() for one in parts]
        rows: list[tuple] = [(kind, flat.count(kind), *one) for kind, *one in zip(LABELS, *sums, strict=True)]
        none = (None,) * len(parts)
        rows += [(label, flat.count(label), *none) for label in NAME_LABELS if self.names is not None]
        rows.append((UNLABELLED, self.score_p[0].numel() - len(self.called()), *none))
        columns = (
            "score passes",
            "of these without effect",
            "opposite effect",
            "detectable, negligible",
            "no matched control",
        )
        return Table(("label", "heads", *columns), rows)

    def order(self) -> list[tuple[int, int]]:
        """Every (layer, head): labelled ones first, by the size of their effect, then those measured, then the rest."""
        strong = torch.where(self.passes, self.effect.mean(0).abs(), 0.0).amax(0)
        measured = self.effect.mean(0).abs().nan_to_num(0).amax(0)
        labelled = torch.zeros_like(strong)
        for at in self.called():
            labelled[at] = 1.0
        key = labelled * 1e6 + strong * 1e3 + measured.clamp_max(1e3)
        by = key.flatten().argsort(descending=True, stable=True).tolist()
        return [divmod(i, strong.shape[1]) for i in by]

    def table(self, n: int | None = 20) -> Table:
        """One row a head and label, with that label's evidence; a head without one shows the nearest, with "?"."""
        return label_rows(self, n)

    def figure(self) -> Any:
        """Label by label, layer by head: who looks at its keys. Blue earned the label; orange only looks."""
        return attention_map(self)


def signs(like: Tensor) -> Float[Tensor, "label one one"]:
    """The direction in which each label claims that the loss moves."""
    return torch.tensor([sign for _, sign in LABELS.values()]).to(like)[:, None, None]
