"""What kinds of heads does a model have? One label a head, with the score, the causal effect and the doubt."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.repeated import Repeated, repeated_tokens
from hooklens.model.linear import packed_linears
from hooklens.plugins.heads.copying import Copying, copying
from hooklens.plugins.heads.knockout import knockout
from hooklens.plugins.heads.named import NameEvidence, name_evidence
from hooklens.plugins.heads.rotations import DRAWS, Mask, PerHead
from hooklens.plugins.heads.scores import HeadScores, head_scores, key_masks
from hooklens.result import Result, Table
from hooklens.statistics import mean_interval, q_values, sign_flip_p

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

#: The labels that repeated tokens can give, the keys whose attention is scored and blocked, and the sign of the loss
#: change that the label claims.
LABELS = {
    "previous token": ("previous", 1.0),
    "duplicate token": ("duplicate", 1.0),
    "induction": ("induction", 1.0),
    "copy suppression": ("induction", -1.0),
}
UNLABELLED = "unlabelled"
PerLabel = Float[Tensor, "label layer head"]


@dataclass(frozen=True, eq=False)
class Taxonomy(Result):
    """Every head's evidence for every label, and the label that it allows.

    `score_p` is the null model's: the share of randomly rotated heads that score as high (for copy suppression, the
    larger of that and the OV's). `effect` is the rise of the loss, in nats a token, on other repeated sequences when
    the head may not look at the label's keys: NaN where the score did not pass, for then it was not measured.
    `placebo` is the rise when it may not look at as many other keys: NaN also where the effect has the wrong sign.
    """

    scores: HeadScores
    ov: Copying
    score_p: Float[Tensor, "label layer head"]
    effect: Float[Tensor, "sequence label layer head"]
    placebo: Float[Tensor, "sequence label layer head"]
    loss: Float[Tensor, "sequence"]
    names: NameEvidence | None
    note: str
    level: float

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
        """Both ends of the mean effect, by a bootstrap over sequences, at 1 - `level`."""
        return self._interval(self.effect)

    def _interval(self, values: Float[Tensor, "sequence label layer head"]) -> tuple[PerLabel, PerLabel]:
        low, high = mean_interval(values.nan_to_num(), level=1 - self.level)
        missing = values[0].isnan()
        return low.masked_fill(missing, torch.nan), high.masked_fill(missing, torch.nan)

    @property
    def passes(self) -> Bool[Tensor, "label layer head"]:
        """Where the score passes, and the effect's interval and q-value exclude 0 on the side that the label claims.

        The effect must also exceed its placebo, with an interval of the difference that excludes 0.
        """
        sign = _signs(self.effect)
        low, _ = self._interval(sign * self.effect)
        above_placebo, _ = self._interval(sign * (self.effect - self.placebo))
        return (self.score_q <= self.level) & (low > 0) & (above_placebo > 0) & (self.effect_q <= self.level)

    def labels(self) -> list[list[str]]:
        """What each head of each layer is called; of several labels that pass, the one of the largest effect."""
        mean = torch.where(self.passes, self.effect.mean(0).abs(), -1.0)
        best, which = mean.max(0)
        kinds = list(LABELS)
        found = [
            [kinds[int(k)] if b >= 0 else UNLABELLED for k, b in zip(*pair, strict=True)]
            for pair in zip(which, best, strict=True)
        ]
        for layer, head in [] if self.names is None else self.names.movers(self.level):
            here = found[layer][head]
            found[layer][head] = "name mover" if here == UNLABELLED else f"{here}, name mover"
        return found

    def counts(self) -> Table:
        """How many heads each label has, and how many had the score but not the effect."""
        flat = [one for row in self.labels() for one in row]
        scored, passed = (self.score_q <= self.level).flatten(1).sum(1), self.passes.flatten(1).sum(1)
        rows: list[tuple] = [
            (kind, sum(kind in one for one in flat), int(s), int(s - p))
            for kind, s, p in zip(LABELS, scored, passed, strict=True)
        ]
        if self.names is not None:
            rows.append(("name mover", sum("name mover" in one for one in flat), None, None))
        rows.append((UNLABELLED, flat.count(UNLABELLED), None, None))
        return Table(("label", "heads", "score passes", "of these without effect"), rows)

    def order(self) -> list[tuple[int, int]]:
        """Every (layer, head): labelled ones first, by the size of their effect, then those measured, then the rest."""
        strong = torch.where(self.passes, self.effect.mean(0).abs(), 0.0).amax(0)
        measured = self.effect.mean(0).abs().nan_to_num(0).amax(0)
        labelled = torch.tensor([[one != UNLABELLED for one in row] for row in self.labels()]).to(strong)
        key = labelled * 1e6 + strong * 1e3 + measured.clamp_max(1e3)
        by = key.flatten().argsort(descending=True, stable=True).tolist()
        return [divmod(i, strong.shape[1]) for i in by]

    def top(self, k: int = 10) -> Table:
        """The `k` heads with the strongest evidence."""
        return self.table(k)

    def table(self, n: int | None = 20) -> Table:
        """One row a head: its label, the evidence for that label (else for the nearest), and how much it rests."""
        labels, (low, high) = self.labels(), self.interval()
        score_q, effect_q, mean = self.score_q, self.effect_q, self.effect.mean(0)
        kinds, rows = list(LABELS), []
        for layer, head in self.order()[:n]:
            at = (self._nearest(layer, head), layer, head)
            kind, label = kinds[at[0]], labels[layer][head]
            score = float(self.scores.mean(LABELS[kind][0])[layer, head])
            row = (f"L{layer}H{head}", label if kind in label else f"{label} ({kind}?)", score, float(score_q[at]))
            evidence = (_number(one[at]) for one in (mean, low, high, effect_q, self.placebo.mean(0)))
            rows.append((*row, *evidence, float(self.scores.mean("first")[layer, head])))
        measured = ("loss rise", "low", "high", "q of rise", "placebo")
        return Table(("head", "label", "attention", "q", *measured, "rests"), rows)

    def _nearest(self, layer: int, head: int) -> int:
        """The label that a head's row shows: that which passed with the largest effect, else that of the least p."""
        effect, passes = self.effect.mean(0)[:, layer, head], self.passes[:, layer, head]
        if bool(passes.any()):
            return int(torch.where(passes, effect.abs(), -1.0).argmax())
        return int(self.score_p[:, layer, head].argmin())

    def figure(self) -> Any:
        """Label by label, layer by head: who looks at its keys. Blue earned the label; orange only looks."""
        from hooklens.viz.figures import heatmap

        attention = torch.stack([self.scores.mean(kind) for kind, _ in LABELS.values()])
        shown = torch.where(self.passes, attention, -attention)
        shown = shown.masked_fill(self.score_q > self.level, torch.nan)
        mean, n_heads = self.effect.mean(0), shown.shape[2]
        hover = [
            [f"loss rise {float(x):.3f}" if x == x else "chance" for x in row.tolist()]
            for row in mean.transpose(0, 1).flatten(1)
        ]
        return heatmap(
            (shown if bool(shown.isfinite().any()) else torch.zeros_like(shown)).transpose(0, 1).flatten(1),
            x=[f"{label} H{head}" for label in LABELS for head in range(n_heads)],
            y=[f"L{layer}" for layer in range(shown.shape[1])],
            title="Attention above chance: blue earned the label, orange did not",
            y_title="layer",
            hover=hover,
            colourbar="attention",
        )

    def report(self) -> Any:
        """The taxonomy as a page: `found.report().save("heads.html", data=found)`."""
        from hooklens.plugins.heads.report import taxonomy_report

        return taxonomy_report(self)


def _signs(like: Tensor) -> Float[Tensor, "label one one"]:
    """The direction in which each label claims that the loss moves."""
    return torch.tensor([sign for _, sign in LABELS.values()]).to(like)[:, None, None]


def _number(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def taxonomy(
    model: "HookedTransformer", *, n: int = 10, level: float = 0.05, draws: int = DRAWS, ioi: int = 64, seed: int = 0
) -> Taxonomy:
    """Which heads are previous-token, duplicate-token, induction or copy-suppression heads? Only where evidence allows.

    A label takes two findings. The score: on `n` repeated random sequences the head looks at the label's keys more
    than heads do whose queries are rotated at random (and for copy suppression its OV lowers the token it reads more
    than rotated values do), at q <= `level` over all heads and labels. The effect: on `n` other sequences, blocking
    exactly that attention raises the loss of the repeated tokens (for copy suppression: lowers it), with an interval
    and a q-value that exclude 0, and more than blocking as many other keys. A head with several labels keeps that of
    the largest effect; one without stays unlabelled.

    >>> from hooklens.testing import induction_model
    >>> taxonomy(induction_model()).labels()
    [['previous token', 'unlabelled'], ['unlabelled', 'induction']]

    With a tokenizer that knows names, `ioi` prompt pairs also look for name movers (0: no).

    Reference: Olsson et al. (2022), "In-context Learning and Induction Heads"; McDougall et al. (2023), "Copy
    Suppression"; Geva et al. (2023), "Dissecting Recall of Factual Associations" (attention knockout).
    """
    if not 0 < level < 1 or n < 6:
        raise InputError(f"level lies between 0 and 1 and n is at least 6 (sign flips), got level {level} and n {n}")
    both = repeated_tokens(model, 2 * n, seed=seed)
    chosen, reported = both.part(0, n), both.part(n, 2 * n)
    with torch.no_grad(), packed_linears(rows=1024):
        scores = head_scores(model, chosen.tokens, draws=draws, seed=seed)
        ov = copying(model, draws=draws, seed=seed)
        score_p = torch.stack([_score_p(label, scores, ov) for label in LABELS])
        masks, asked = key_masks(reported.tokens), q_values(score_p) <= level
        effect = _effects(model, reported, masks, asked)
        others = {kind: placebo_mask(mask, seed) for kind, mask in masks.items()}
        placebo = _effects(model, reported, others, asked & (_signs(effect) * effect.mean(0) > 0))
        loss = -reported.metric()(model(reported.tokens))
        names, note = name_evidence(model, ioi, seed=seed) if ioi else (None, "name movers were not asked for")
    return Taxonomy(scores, ov, score_p, effect, placebo, loss, names, note, level)


def placebo_mask(mask: Mask, seed: int = 0) -> Mask:
    """As many other keys for every query, drawn at random from those before it but the first; fewer if there are fewer.

    >>> placebo_mask(torch.tensor([[[0, 0, 0], [1, 0, 0], [0, 0, 1]]]).bool())[0].int().tolist()
    [[0, 0, 0], [0, 0, 0], [0, 1, 0]]
    """
    n = mask.shape[-1]
    pos = torch.arange(n, device=mask.device)
    free = (pos < pos[:, None]) & (pos > 0) & ~mask
    drawn = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)).to(mask.device)
    place = drawn.masked_fill(~free, -1.0).argsort(-1, descending=True).argsort(-1)
    return free & (place < mask.sum(-1, keepdim=True))


def _score_p(label: str, scores: HeadScores, ov: Copying) -> PerHead:
    p = scores.p[LABELS[label][0]]
    return torch.maximum(p, ov.suppresses.to(p)) if label == "copy suppression" else p


def _effects(
    model: "HookedTransformer", sequences: Repeated, masks: dict[str, Mask], asked: Bool[Tensor, "label layer head"]
) -> Float[Tensor, "sequence label layer head"]:
    """The knockout effect of every head and label asked for, NaN elsewhere; labels of one kind share a sweep."""
    metric, kinds = sequences.metric(), [kind for kind, _ in LABELS.values()]
    effect = torch.full((len(sequences), *asked.shape), torch.nan, dtype=model.dtype, device=model.device)
    for kind in dict.fromkeys(kinds):
        rows = [i for i, one in enumerate(kinds) if one == kind]
        heads = [(int(a), int(b)) for a, b in asked[rows].any(0).nonzero()]
        if heads:
            found = knockout(model, sequences.tokens, metric, kind=kind, mask=masks[kind], heads=heads)
            layers, which = (list(part) for part in zip(*heads, strict=True))
            for row in rows:
                effect[:, row, layers, which] = found.fall.to(effect)
    return torch.where(asked.to(effect.device), effect, torch.nan)


def demo(model: "HookedTransformer") -> Taxonomy:
    """The taxonomy on few short sequences; any model that reads tokens."""
    return taxonomy(model, n=6, draws=50, ioi=0)
