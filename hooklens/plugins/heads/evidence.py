"""A taxonomy's evidence as a table and as a map."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooklens.core.component import Component, head_name, layer_names
from hooklens.plugins.heads.head_scores import LABELS
from hooklens.plugins.heads.named import NAME_LABELS
from hooklens.results.result import Table

if TYPE_CHECKING:
    from hooklens.plugins.heads.head_labels import Taxonomy

_EFFECT = ("effect", "low", "high", "q of effect", "share of loss", "placebo", "placebo took")
_SUPPRESSION = ("anti-copy", "ECE change")


def label_rows(found: "Taxonomy", n: int | None) -> Table:
    """One row per head and label. `effect` is in nats per token; for name labels, the share of the logit difference.

    `share of loss` is the effect as a share of the loss on the repeated tokens.
    """
    called, make = found.called(), {**_on_repeats(found), **_on_names(found)}
    first, suppressed = found.scores.mean("first"), _suppressed(found)
    share = None if found.positions is None else found.positions.share
    extra = (("by position",) if share is not None else ()) + (_SUPPRESSION if suppressed else ())
    rows: list[tuple] = []
    for at in found.order()[:n]:
        near = list(LABELS)[_nearest(found, at)]
        against = bool(found.opposite[list(LABELS).index(near)][at])
        for label in called.get(at, ["unlabelled"]):
            kind = label if label in make else near
            position = (float(share[at]) if kind == "previous token" else None,) if share is not None else ()
            negative = (
                suppressed.get(at, (None, None))
                if kind in ("copy suppression", "negative name mover")
                else (None, None)
            )
            nearest = [f"{near}{': opposite effect' if against else '?'}"] * (label not in make)
            doubts = nearest + _doubts(found, kind, at)
            said = f"{label} ({'; '.join(doubts)})" if doubts else label
            row = (head_name(*at), said, *(_number(x[at]) for x in make[kind]), float(first[at]))
            rows.append((*row, *position, *(negative if suppressed else ())))
    return Table(("head", "label", "score", "q", *_EFFECT, "rests", *extra), rows).head(n)


def _doubts(found: "Taxonomy", kind: str, at: tuple[int, int]) -> list[str]:
    """Qualifications of a head's evidence for a label: a negligible effect, or a control that could not match it."""
    if kind not in LABELS:
        return []
    told = {"detectable, negligible": found.negligible, "no matched control": found.unmatched}
    return [words for words, where in told.items() if bool(where[list(LABELS).index(kind)][at])]


def _on_repeats(found: "Taxonomy") -> dict[str, list[Tensor]]:
    """Score, q, effect, its interval, its q, its share of the loss, placebo and its attention, label by label."""
    (low, high), score_q, effect_q = found.interval(), found.score_q, found.effect_q
    effect, rest = found.effect.mean(0), (found.share, found.placebo.mean(0), found.matched)
    return {
        label: [found.scores.mean(kind), score_q[i], effect[i], low[i], high[i], effect_q[i], *(x[i] for x in rest)]
        for i, (label, (kind, _)) in enumerate(LABELS.items())
    }


def _on_names(found: "Taxonomy") -> dict[str, list[Tensor]]:
    """The same on indirect-object prompts: q of the labelling pairs, margin and direct effect of the others."""
    if found.names is None:
        return {}
    movers, q = found.names.reported, found.names.q
    ends, none = movers.share_interval(), torch.full_like(movers.share, torch.nan)
    return {
        label: [movers.margin.mean(0), q[i], movers.share, *ends, q[i], none, none, none]
        for i, label in enumerate(NAME_LABELS)
    }


def _suppressed(found: "Taxonomy") -> dict[tuple[int, int], tuple[float, float | None]]:
    """How much a head lowers the logit of the token it attends to, and the calibration change without it."""
    if found.suppression is None or found.suppression.calibration is None:
        return {}
    change, anti = found.suppression.calibration, found.suppression.anti
    at = [Component.parse(name).place for name in change.heads]
    return {one: (float(anti[one]), float(change.change[i])) for i, one in enumerate(at)}


def _nearest(found: "Taxonomy", at: tuple[int, int]) -> int:
    """The label with the opposite effect if there is one, else that with the smallest p."""
    against = found.opposite[:, at[0], at[1]]
    by = found.score_p[:, at[0], at[1]]
    return int((torch.where(against.to(by.device), by - 2, by)).argmin())


def _number(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def attention_map(found: "Taxonomy") -> Any:
    """Layer by label and head: attention above chance, negative if the label was not earned."""
    from hooklens.viz.figures import heatmap

    attention = torch.stack([found.scores.mean(kind) for kind, _ in LABELS.values()])
    shown = torch.where(found.passes, attention, -attention)
    shown = shown.masked_fill(found.score_q > found.alpha, torch.nan)
    mean, n_heads = found.effect.mean(0), shown.shape[2]
    hover = [
        [f"loss rise {float(x):.3f}" if x == x else "chance" for x in row.tolist()]
        for row in mean.transpose(0, 1).flatten(1)
    ]
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
    return drawn.update_traces(
        colorbar={"tickvals": [-reach, 0, reach], "ticktext": [f"{reach:.2f}", "0", f"{reach:.2f}"]}
    )
