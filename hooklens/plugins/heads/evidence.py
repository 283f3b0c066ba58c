"""A taxonomy's evidence as a table and as a map."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooklens.core.component import Component, head_name, layer_names
from hooklens.plugins.heads.head_ranking import Head, known
from hooklens.plugins.heads.head_scores import LABELS
from hooklens.plugins.heads.named import NAME_LABELS
from hooklens.results.result import Table

if TYPE_CHECKING:  # it draws its tables with this module
    from hooklens.plugins.heads.head_labels import Taxonomy

_EFFECT = ("effect", "low", "high", "q of effect", "share of loss", "placebo", "placebo took")
_SUPPRESSION = ("anti-copy", "ECE change")


def label_rows(taxonomy: "Taxonomy", n: int | None) -> Table:
    """One row per head and label. `effect` is in nats per token; for name labels, the share of the logit difference.

    `share of loss` is the effect as a share of the loss on the repeated tokens.
    """
    called, evidence = taxonomy.called(), _on_repeats(taxonomy) | _on_names(taxonomy)
    first, suppressed = taxonomy.scores.mean("first"), _suppressed(taxonomy)
    rows: list[tuple] = []
    for at in taxonomy.order()[:n]:
        nearest = _nearest(taxonomy, at)
        for label in called.get(at, ["unlabelled"]):
            kind = label if label in evidence else list(LABELS)[nearest]
            doubts = _doubts(taxonomy, kind, at)
            if label not in evidence:
                doubts.insert(0, f"{kind}{': opposite effect' if bool(taxonomy.opposite[nearest][at]) else '?'}")
            words = f"{label} ({'; '.join(doubts)})" if doubts else label
            row = [head_name(*at), words, *(known(float(x[at])) for x in evidence[kind]), float(first[at])]
            if taxonomy.positions is not None:
                row.append(float(taxonomy.positions.share[at]) if kind == "previous token" else None)
            if suppressed:
                suppresses = kind in ("copy suppression", "negative name mover")
                row += suppressed.get(at, (None, None)) if suppresses else (None, None)
            rows.append(tuple(row))
    by_position = ("by position",) if taxonomy.positions is not None else ()
    columns = ("head", "label", "score", "q", *_EFFECT, "rests", *by_position, *(_SUPPRESSION if suppressed else ()))
    return Table(columns, rows).head(n)


def _doubts(taxonomy: "Taxonomy", kind: str, at: Head) -> list[str]:
    """Qualifications of a head's evidence for a label: a negligible effect, or a control that could not match it."""
    if kind not in LABELS:
        return []
    doubts = {"detectable, negligible": taxonomy.negligible, "no matched control": taxonomy.unmatched}
    return [words for words, where in doubts.items() if bool(where[list(LABELS).index(kind)][at])]


def _on_repeats(taxonomy: "Taxonomy") -> dict[str, list[Tensor]]:
    """Score, q, effect, its interval, its q, its share of the loss, placebo and its attention, label by label."""
    parts = [taxonomy.score_q, taxonomy.effect.mean(0), *taxonomy.interval(), taxonomy.effect_q, taxonomy.share]
    parts += [taxonomy.placebo.mean(0), taxonomy.matched]
    return {
        label: [taxonomy.scores.mean(kind), *(part[i] for part in parts)]
        for i, (label, (kind, _)) in enumerate(LABELS.items())
    }


def _on_names(taxonomy: "Taxonomy") -> dict[str, list[Tensor]]:
    """The same on indirect-object prompts: q of the labelling pairs, margin and direct effect of the others."""
    if taxonomy.names is None:
        return {}
    movers, q = taxonomy.names.reported, taxonomy.names.q
    ends, none = movers.share_interval(), torch.full_like(movers.share, torch.nan)
    return {
        label: [movers.margin.mean(0), q[i], movers.share, *ends, q[i], none, none, none]
        for i, label in enumerate(NAME_LABELS)
    }


def _suppressed(taxonomy: "Taxonomy") -> dict[Head, tuple[float, float]]:
    """How much a head lowers the logit of the token it attends to, and the calibration change without it."""
    if taxonomy.suppression is None or taxonomy.suppression.calibration is None:
        return {}
    change, anti = taxonomy.suppression.calibration, taxonomy.suppression.anti
    heads = [Component.parse(name).place for name in change.heads]
    return {head: (float(anti[head]), float(change.change[i])) for i, head in enumerate(heads)}


def _nearest(taxonomy: "Taxonomy", at: Head) -> int:
    """The label with the opposite effect if there is one, else that with the smallest p."""
    p = taxonomy.score_p[:, at[0], at[1]]
    return int(torch.where(taxonomy.opposite[:, at[0], at[1]].to(p.device), p - 2, p).argmin())


def attention_map(taxonomy: "Taxonomy") -> Any:
    """Layer by label and head: attention above chance, negative if the label was not earned."""
    from hooklens.viz.figures import heatmap

    attention = torch.stack([taxonomy.scores.mean(kind) for kind, _ in LABELS.values()])
    shown = torch.where(taxonomy.passes, attention, -attention)
    shown = shown.masked_fill(taxonomy.score_q > taxonomy.alpha, torch.nan)
    mean, n_heads = taxonomy.effect.mean(0), shown.shape[2]
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
