"""The labels that the evidence supports for each head, and the table that shows the evidence."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.plugins.heads.copy_suppression import CopySuppression
from hooklens.plugins.heads.copying import Copying
from hooklens.plugins.heads.evidence import attention_map, label_rows
from hooklens.plugins.heads.head_scores import LABELS, HeadScores
from hooklens.plugins.heads.named import NAME_LABELS, NameEvidence
from hooklens.plugins.heads.previous_token import PositionScores
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, q_values, sign_flip_p

if TYPE_CHECKING:
    pass

UNLABELLED = "unlabelled"
#: As a share of the loss: a smaller effect is detectable but negligible.
LEAST_SHARE = 0.01
#: As a share of the blocked attention: a placebo that takes less is not a matched control.
LEAST_MATCH = 0.5
PerLabel = Float[Tensor, "label layer head"]


@dataclass(frozen=True, eq=False)
class Taxonomy(Result):
    """Every head's evidence for every label, and the labels that it supports.

    `score_p` comes from the null model: the share of randomly rotated heads with as high a score (for copy suppression,
    the larger of that and the OV's). `effect` is the increase of the loss, in nats per token, on other repeated
    sequences when the head cannot attend to the label's keys; it is not measured, and NaN, if the score did not pass.
    `placebo` is the increase when the same amount of attention is taken from the head's other keys; it is NaN also if
    the effect alone does not differ from 0. `blocked` is the attention that was taken in each of the two: a head that
    pays more than half of its attention to the label's keys leaves less elsewhere for the placebo to take (see
    `matched`). `names` is the evidence from indirect-object prompts, and `positions` the effect of positions alone on
    queries and keys. `suppression` is the effect of heads labelled copy suppression or negative name mover on the token
    they attend to and on calibration. These are None if the model does not support them, or if no head has such a
    label. `note` gives the reason, or says which pairs label name movers.
    """

    ranked_by = "strength of the evidence"

    terms = {
        "head": "L5H1 is head 1 of layer 5",
        "label": "the head's label, or the nearest label with a question mark",
        "score": "mean attention to the label's keys; for names, the margin over any other position",
        "q": "the false discovery rate of the score, over all heads and labels",
        "effect": "rise of the loss in nats per token when the head cannot attend to these keys (names: the share of "
        "the logit difference that it restores directly)",
        "low": "lower end of the effect's 95 % interval over sequences",
        "high": "upper end of that interval",
        "q of effect": "the false discovery rate of the effect, over those measured",
        "share of loss": "the effect as a share of the loss",
        "placebo": "the control: the rise when as much attention is taken from its other keys",
        "placebo took": "the attention that the placebo took, as a share of what was blocked: other keys may hold too "
        "little; below half, it is not a matched control",
        "rests": "mean attention to the first token, to which idle heads attend",
        "by position": "share of queries for which positions alone select the previous token",
        "anti-copy": "how much more the head lowers the logit of the attended token than that of another",
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
        """Benjamini-Hochberg over the measured effects: those whose score passed, on other sequences."""
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
        """Where the score passes, and the effect's interval and q-value exclude 0 in the direction of the label."""
        low, _ = self._interval(signs(self.effect) * self.effect)
        return (self.score_q <= self.alpha) & (low > 0) & (self.effect_q <= self.alpha)

    @property
    def opposite(self) -> Bool[Tensor, "label layer head"]:
        """Where the score passes, and the effect's interval and q-value exclude 0 in the opposite direction."""
        _, high = self._interval(signs(self.effect) * self.effect)
        return (self.score_q <= self.alpha) & (high < 0) & (self.effect_q <= self.alpha)

    @property
    def share(self) -> Float[Tensor, "label layer head"]:
        """The size of the effect as a share of the loss on the repeated tokens in the untouched run."""
        return self.effect.mean(0) / self.loss.mean()

    @property
    def negligible(self) -> Bool[Tensor, "label layer head"]:
        """Where the label is earned by a significant effect of less than 1 % of the loss."""
        return self.passes & (self.share.abs() < LEAST_SHARE)

    @property
    def matched(self) -> Float[Tensor, "label layer head"]:
        """The attention that the placebo took, as a share of the blocked attention; NaN if not measured."""
        if self.blocked is None:
            return torch.full_like(self.score_p, torch.nan)
        return self.blocked[1] / self.blocked[0]

    @property
    def unmatched(self) -> Bool[Tensor, "label layer head"]:
        """Where the placebo took less than half: no control could have shown an effect of that size."""
        return self.matched < LEAST_MATCH

    @property
    def passes(self) -> Bool[Tensor, "label layer head"]:
        """Where a candidate's effect also exceeds its placebo, with an interval of the difference that excludes 0."""
        above_placebo, _ = self._interval(signs(self.effect) * (self.effect - self.placebo))
        return self.candidates & (above_placebo > 0)

    def called(self) -> dict[tuple[int, int], list[str]]:
        """The labels of each labelled head: the one with the largest effect on repeated tokens, then name labels."""
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
        """The label of each head of each layer."""
        called, (n_layers, n_heads) = self.called(), self.score_p.shape[1:]
        return [
            [", ".join(called.get((layer, head), [UNLABELLED])) for head in range(n_heads)] for layer in range(n_layers)
        ]

    def counts(self) -> Table:
        """The number of heads with each label, with the score but no effect, and with the opposite effect."""
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
        """Every (layer, head): labelled heads first, by effect size, then measured ones, then the rest."""
        strong = torch.where(self.passes, self.effect.mean(0).abs(), 0.0).amax(0)
        measured = self.effect.mean(0).abs().nan_to_num(0).amax(0)
        labelled = torch.zeros_like(strong)
        for at in self.called():
            labelled[at] = 1.0
        key = labelled * 1e6 + strong * 1e3 + measured.clamp_max(1e3)
        by = key.flatten().argsort(descending=True, stable=True).tolist()
        return [divmod(i, strong.shape[1]) for i in by]

    def table(self, n: int | None = 20) -> Table:
        """One row per head and label, with the label's evidence; a head without a label shows the nearest, with "?"."""
        return label_rows(self, n)

    def figure(self) -> Any:
        """Layer by label and head: which heads attend to a label's keys. Blue earned the label, orange did not."""
        return attention_map(self)


def signs(like: Tensor) -> Float[Tensor, "label one one"]:
    """The direction in which each label predicts that the loss changes."""
    return torch.tensor([sign for _, sign in LABELS.values()]).to(like)[:, None, None]
