"""The labels that the evidence supports for each head, and the table that shows the evidence."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.component import Component, head_name, layer_names
from hooklens.plugins.heads.copy_suppression import CopySuppression
from hooklens.plugins.heads.copying import Copying
from hooklens.plugins.heads.head_ranking import Head, known, ranked
from hooklens.plugins.heads.head_scores import LABELS, HeadScores
from hooklens.plugins.heads.named import NAME_LABELS, NameEvidence
from hooklens.plugins.heads.previous_token import PositionScores
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, q_values, sign_flip_p

UNLABELLED = "unlabelled"
#: As a share of the loss: a smaller effect is detectable but negligible.
LEAST_SHARE = 0.01
#: As a share of the blocked attention: a placebo that takes less is not a matched control.
LEAST_MATCH = 0.5
PerLabel = Float[Tensor, "label layer head"]
Where = Bool[Tensor, "label layer head"]
_EFFECT = ("effect", "low", "high", "q of effect", "share of loss", "placebo", "placebo took")
_SUPPRESSION = ("anti-copy", "ECE change")


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
    score_p: PerLabel
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
    def score_q(self) -> PerLabel:
        """Benjamini-Hochberg over all heads and labels."""
        return q_values(self.score_p)

    @property
    def effect_q(self) -> PerLabel:
        """Benjamini-Hochberg over the measured effects: those whose score passed, on other sequences."""
        return q_values(sign_flip_p(self.effect))

    def interval(self) -> tuple[PerLabel, PerLabel]:
        """Both ends of the mean effect, by a bootstrap over sequences, at 1 - `alpha`."""
        return mean_interval(self.effect, level=1 - self.alpha)

    def _predicted(self, values: Float[Tensor, "sequence label layer head"]) -> tuple[PerLabel, PerLabel]:
        """The interval of the mean in the direction in which each label predicts that the loss changes."""
        signs = torch.tensor([sign for _, sign in LABELS.values()]).to(values)[:, None, None]
        return mean_interval(signs * values, level=1 - self.alpha)

    @cached_property
    def candidates(self) -> Where:
        """Where the score passes, and the effect's interval and q-value exclude 0 in the direction of the label."""
        return (self.score_q <= self.alpha) & (self._predicted(self.effect)[0] > 0) & (self.effect_q <= self.alpha)

    @cached_property
    def opposite(self) -> Where:
        """Where the score passes, and the effect's interval and q-value exclude 0 in the opposite direction."""
        return (self.score_q <= self.alpha) & (self._predicted(self.effect)[1] < 0) & (self.effect_q <= self.alpha)

    @cached_property
    def passes(self) -> Where:
        """Where a candidate's effect also exceeds its placebo, with an interval of the difference that excludes 0."""
        return self.candidates & (self._predicted(self.effect - self.placebo)[0] > 0)

    @property
    def share(self) -> PerLabel:
        """The size of the effect as a share of the loss on the repeated tokens in the untouched run."""
        return self.effect.mean(0) / self.loss.mean()

    @property
    def negligible(self) -> Where:
        """Where the label is earned by a significant effect of less than 1 % of the loss."""
        return self.passes & (self.share.abs() < LEAST_SHARE)

    @property
    def matched(self) -> PerLabel:
        """The attention that the placebo took, as a share of the blocked attention; NaN if not measured."""
        if self.blocked is None:
            return torch.full_like(self.score_p, torch.nan)
        return self.blocked[1] / self.blocked[0]

    @property
    def unmatched(self) -> Where:
        """Where the placebo took less than half: no control could have shown an effect of that size."""
        return self.matched < LEAST_MATCH

    def called(self) -> dict[Head, list[str]]:
        """The labels of each labelled head: the one with the largest effect on repeated tokens, then name labels."""
        best, label = torch.where(self.passes, self.effect.mean(0).abs(), -1.0).max(0)
        kinds = list(LABELS)
        called = {(layer, head): [kinds[int(label[layer, head])]] for layer, head in (best >= 0).nonzero().tolist()}
        named = {} if self.names is None else self.names.labelled(self.alpha)
        for name, heads in named.items():
            for head in heads:
                called.setdefault(head, []).append(name)
        return called

    def labels(self) -> list[list[str]]:
        """The label of each head of each layer."""
        called, (n_layers, n_heads) = self.called(), self.score_p.shape[1:]
        return [
            [", ".join(called.get((layer, head), [UNLABELLED])) for head in range(n_heads)] for layer in range(n_layers)
        ]

    def counts(self) -> Table:
        """The number of heads with each label, with the score but no effect, and with the opposite effect."""
        scored, passes, opposite = self.score_q <= self.alpha, self.passes, self.opposite
        counted = {
            "score passes": scored,
            "of these without effect": scored & ~passes & ~opposite,
            "opposite effect": opposite,
            "detectable, negligible": self.negligible,
            "no matched control": passes & self.unmatched.to(scored.device),
        }
        called = self.called()
        labels = [label for labels in called.values() for label in labels]
        sums = zip(*(where.sum((1, 2)).tolist() for where in counted.values()), strict=True)
        rows: list[tuple] = [(kind, labels.count(kind), *row) for kind, row in zip(LABELS, sums, strict=True)]
        none = (None,) * len(counted)
        rows += [(label, labels.count(label), *none) for label in NAME_LABELS if self.names is not None]
        rows.append((UNLABELLED, self.score_p[0].numel() - len(called), *none))
        return Table(("label", "heads", *counted), rows)

    def order(self) -> list[Head]:
        """Every (layer, head): labelled heads first, by effect size, then measured ones, then the rest."""
        size = self.effect.mean(0).abs().nan_to_num(0)
        labelled = torch.zeros_like(size[0])
        for head in self.called():
            labelled[head] = 1.0
        earned = torch.where(self.passes, size, 0.0).amax(0)
        return ranked(labelled * 1e6 + earned * 1e3 + size.amax(0).clamp_max(1e3))

    def table(self, n: int | None = 20) -> Table:
        """One row per head and label, with the label's evidence; a head without a label shows the nearest, with "?".

        `effect` is in nats per token; for name labels, the share of the logit difference. `share of loss` is the effect
        as a share of the loss on the repeated tokens.
        """
        called, evidence = self.called(), _on_repeats(self) | _on_names(self)
        first, suppressed = self.scores.mean("first"), _suppressed(self)
        rows: list[tuple] = []
        for at in self.order()[:n]:
            nearest = _nearest(self, at)
            for label in called.get(at, ["unlabelled"]):
                kind = label if label in evidence else list(LABELS)[nearest]
                doubts = _doubts(self, kind, at)
                if label not in evidence:
                    doubts.insert(0, f"{kind}{': opposite effect' if bool(self.opposite[nearest][at]) else '?'}")
                words = f"{label} ({'; '.join(doubts)})" if doubts else label
                row = [head_name(*at), words, *(known(float(x[at])) for x in evidence[kind]), float(first[at])]
                if self.positions is not None:
                    row.append(float(self.positions.share[at]) if kind == "previous token" else None)
                if suppressed:
                    suppresses = kind in ("copy suppression", "negative name mover")
                    row += suppressed.get(at, (None, None)) if suppresses else (None, None)
                rows.append(tuple(row))
        columns = ["head", "label", "score", "q", *_EFFECT, "rests"]
        columns += ["by position"] if self.positions is not None else []
        columns += _SUPPRESSION if suppressed else []
        return Table(columns, rows).head(n)

    def figure(self) -> Any:
        """Layer by label and head: which heads attend to a label's keys. Blue earned the label, orange did not."""
        from hooklens.viz.figures import heatmap

        attention = torch.stack([self.scores.mean(kind) for kind, _ in LABELS.values()])
        shown = torch.where(self.passes, attention, -attention)
        shown = shown.masked_fill(self.score_q > self.alpha, torch.nan)
        mean, n_heads = self.effect.mean(0), shown.shape[2]
        rises = mean.transpose(0, 1).flatten(1).tolist()
        hover = [[f"loss rise {rise:.3f}" if rise == rise else "chance" for rise in row] for row in rises]
        drawn = heatmap(
            (shown if bool(shown.isfinite().any()) else torch.zeros_like(shown)).transpose(0, 1).flatten(1),
            x=[f"{label} H{head}" for label in LABELS for head in range(n_heads)],
            y=layer_names(shown.shape[1]),
            title="Attention above chance: blue earned the label, orange did not",
            y_title="layer",
            hover=hover,
            colourbar="attention",
        )
        reach = float(drawn.data[0].zmax)
        ticks = {"tickvals": [-reach, 0, reach], "ticktext": [f"{reach:.2f}", "0", f"{reach:.2f}"]}
        return drawn.update_traces(colorbar=ticks)


def _doubts(taxonomy: Taxonomy, kind: str, at: Head) -> list[str]:
    """Qualifications of a head's evidence for a label: a negligible effect, or a control that could not match it."""
    if kind not in LABELS:
        return []
    doubts = {"detectable, negligible": taxonomy.negligible, "no matched control": taxonomy.unmatched}
    return [words for words, where in doubts.items() if bool(where[list(LABELS).index(kind)][at])]


def _on_repeats(taxonomy: Taxonomy) -> dict[str, list[Tensor]]:
    """Score, q, effect, its interval, its q, its share of the loss, placebo and its attention, label by label."""
    parts = [taxonomy.score_q, taxonomy.effect.mean(0), *taxonomy.interval(), taxonomy.effect_q, taxonomy.share]
    parts += [taxonomy.placebo.mean(0), taxonomy.matched]
    return {
        label: [taxonomy.scores.mean(kind), *(part[i] for part in parts)]
        for i, (label, (kind, _)) in enumerate(LABELS.items())
    }


def _on_names(taxonomy: Taxonomy) -> dict[str, list[Tensor]]:
    """The same on indirect-object prompts: q of the labelling pairs, margin and direct effect of the others."""
    if taxonomy.names is None:
        return {}
    movers, q = taxonomy.names.reported, taxonomy.names.q
    ends, none = movers.share_interval(), torch.full_like(movers.share, torch.nan)
    return {
        label: [movers.margin.mean(0), q[i], movers.share, *ends, q[i], none, none, none]
        for i, label in enumerate(NAME_LABELS)
    }


def _suppressed(taxonomy: Taxonomy) -> dict[Head, tuple[float, float]]:
    """How much a head lowers the logit of the token it attends to, and the calibration change without it."""
    if taxonomy.suppression is None or taxonomy.suppression.calibration is None:
        return {}
    change, anti = taxonomy.suppression.calibration, taxonomy.suppression.anti
    heads = [Component.parse(name).place for name in change.heads]
    return {head: (float(anti[head]), float(change.change[i])) for i, head in enumerate(heads)}


def _nearest(taxonomy: Taxonomy, at: Head) -> int:
    """The label with the opposite effect if there is one, else that with the smallest p."""
    p = taxonomy.score_p[:, at[0], at[1]]
    return int(torch.where(taxonomy.opposite[:, at[0], at[1]].to(p.device), p - 2, p).argmin())
