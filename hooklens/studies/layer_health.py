"""Which layers of a run have vanishing or exploding gradients, or weights that grow without bound?"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hooklens.results.table import Table

FEWEST = 20  # steps that can be judged
VANISHED = 1e-3  # of the gradient norm that is usual; see `_usual`
EXPLODED = 100.0  # times a layer's own median before
GROWING = 0.10  # growth of a norm per doubling of the steps
KEPT_UP = 0.9  # of the growth over the doubling before

CRITERIA = (
    f"Vanishing: over the last tenth of the steps, the layer's median gradient norm is below {VANISHED:g} of that of "
    "the median layer, or of the last layer, which is nearest to the loss, unless it explodes. Exploding: after the "
    f"first tenth of the steps, a gradient norm is above {EXPLODED:g} times the layer's own median over all tenths "
    "before. Growing without bound: over each of the last two doublings of the number of steps (from a quarter of them "
    f"to half, and from half to now) the layer's parameter norm grew by more than {GROWING:.0%}, and over the last by "
    f"at least {KEPT_UP:.0%} of its growth over the one before; this is common early in a run, before weight "
    f"decay balances the steps. Nothing is judged before step {FEWEST}."
)
TERMS = {
    "layer": "a block of the model, or a part of it outside the blocks",
    "verdict": "by the criteria above",
    "gradient norm": "the length of the loss's gradient in this layer's parameters, median of the last tenth of the "
    "steps",
    "of the usual": "this norm divided by the larger of those of the median layer and of the last layer",
    "largest": "the largest gradient norm of a step",
    "parameter norm": "the length of all the layer's parameters as one vector, now",
    "growth": "how much longer it became over the last doubling of the number of steps",
    "update ratio": "length of a step's change of the parameters divided by the parameters' own, median of all "
    "steps; about 0.001 is common, and values far above it mean steps that may be too large",
}


@dataclass(frozen=True)
class Judged:
    """What was seen in one layer; an empty sentence means that no criterion is met."""

    layer: str
    verdict: str
    sentence: str


def judge_layers(layers: Sequence[str], gradients: NDArray, parameters: NDArray) -> list[Judged]:
    """Vanishing, exploding or growing? Norms of gradients and parameters are `step layer`.

    >>> healthy, silent = np.ones(100), np.full(100, 1e-6)
    >>> norms = np.stack([healthy, healthy, silent], 1)
    >>> [layer.verdict for layer in judge_layers(["embed", "blocks.0", "unembed"], norms, np.ones((100, 3)))]
    ['healthy', 'healthy', 'vanishing']
    """
    if len(gradients) < FEWEST:
        return [Judged(layer, "too early", "") for layer in layers]
    last = np.median(_last_tenth(gradients), axis=0)
    usual, judged = _usual(gradients), []
    for i, layer in enumerate(layers):
        seen = [
            _vanishing(float(last[i]), usual),
            _exploding(gradients[:, i].astype(np.float64)),
            _growing(parameters[:, i].astype(np.float64)),
        ]
        faults = [fault for fault in seen if fault is not None]
        verdict = ", ".join(word for word, _ in faults) or "healthy"
        judged.append(Judged(layer, verdict, " ".join(f"{layer}: {sentence}." for _, sentence in faults)))
    return judged


def layer_table(layers: Sequence[str], gradients: NDArray, parameters: NDArray, changes: NDArray) -> Table:
    """The numbers that are judged, a row for each layer."""
    last, largest = np.median(_last_tenth(gradients), axis=0), gradients.max(axis=0)
    usual = _usual(gradients)
    ratio = np.median(changes / np.maximum(parameters, np.finfo(np.float32).tiny), axis=0)
    rows = [
        (
            judged.layer,
            judged.verdict,
            float(last[i]),
            float(last[i] / usual) if usual > 0 else float("nan"),
            float(largest[i]),
            float(parameters[-1, i]),
            f"{_growth(parameters[:, i].astype(np.float64))[0]:.1%}",
            float(ratio[i]),
        )
        for i, judged in enumerate(judge_layers(layers, gradients, parameters))
    ]
    return Table(tuple(TERMS), rows)


def _last_tenth(values: NDArray) -> NDArray:
    return values[-max(1, len(values) // 10) :]


def _usual(gradients: NDArray) -> float:
    """The median layer's norm, or the last layer's where that is larger: most layers before it may be dead."""
    last = np.median(_last_tenth(gradients), axis=0)
    explodes = len(gradients) >= FEWEST and _exploding(gradients[:, -1].astype(np.float64)) is not None
    return float(np.median(last) if explodes else max(np.median(last), last[-1]))


def _vanishing(norm: float, usual: float) -> tuple[str, str] | None:
    if usual > 0 and norm < VANISHED * usual:
        return "vanishing", f"its gradient vanishes: {norm:.3g}, where {usual:.3g} is usual among the layers"
    return None


def _exploding(norms: NDArray) -> tuple[str, str] | None:
    """The first step whose norm is far above the median of all tenths of the run before its own."""
    edges = np.linspace(0, len(norms), 11).astype(int).tolist()
    for start, stop in itertools.pairwise(edges[1:]):
        usual, largest = float(np.median(norms[:start])), float(norms[start:stop].max())
        if not largest <= EXPLODED * usual and usual > 0:
            step = start + int(norms[start:stop].argmax()) + 1
            return "exploding", f"its gradient explodes: {largest:.3g} in step {step}, where {usual:.3g} was usual"
    return None


def _growing(norms: NDArray) -> tuple[str, str] | None:
    now, before = _growth(norms)
    if min(now, before) > GROWING and now >= KEPT_UP * before:
        words = f"its parameters grow, without bound so far: by {now:.0%} over the last doubling of the steps"
        return "growing", f"{words}, by {before:.0%} over the one before"
    return None


def _growth(norms: NDArray) -> tuple[float, float]:
    """By which share a norm grew over the last doubling of the number of steps, and over the one before."""
    n = len(norms)
    quarter, half, end = norms[max(n // 4, 1) - 1], norms[max(n // 2, 1) - 1], norms[-1]
    now = end / half - 1 if half > 0 else 0.0
    return float(now), float(half / quarter - 1 if quarter > 0 else 0.0)
