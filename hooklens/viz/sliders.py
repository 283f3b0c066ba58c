"""A slider: several figures in one place, of which one is shown."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from hooklens.core.errors import InputError
from hooklens.viz.text import label
from hooklens.viz.theme import NEUTRAL

_BELOW = 96  # pixels for the slider and its labels
_MARGIN = 0.05  # of an axis, beyond the values


def slider(figures: Mapping[str, go.Figure], *, title: str = "step") -> go.Figure:
    """How does a figure change? All of them in one, with a slider below that shows one at a time, at first the last.

    >>> import torch
    >>> from hooklens.viz.figures import heatmap
    >>> moving = slider({"1": heatmap(torch.zeros(2, 2)), "10": heatmap(torch.eye(2))})
    >>> [frame.name for frame in moving.frames], moving.layout.sliders[0].active
    (['1', '10'], 1)

    The figures have the same traces, labels and sizes; all but the last may leave out what does not change. Colours
    and axes span the values of all of them.
    """
    drawn = [go.Figure(figure) for figure in figures.values()]
    kinds = [[trace.type for trace in figure.data] for figure in drawn]
    if not drawn or any(kind != kinds[0] for kind in kinds):
        raise InputError(
            f"slider shows figures with the same traces, one at a time; got {len(drawn)} figures with "
            f"{sorted({len(kind) for kind in kinds})} traces; draw them with one function from values of one shape"
        )
    _share_colours(drawn)
    names = [label(name) for name in figures]
    figure = go.Figure(drawn[-1])
    for axis, letter in ((figure.layout.xaxis, "x"), (figure.layout.yaxis, "y")):
        if set(kinds[0]) == {"scatter"}:
            axis.range = _range([trace[letter] for other in drawn for trace in other.data], axis.type == "log")
    figure.frames = [go.Frame(name=name, data=data) for name, data in zip(names, _changing(drawn), strict=True)]
    at_once = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    bottom = (figure.layout.margin.b or 48) + _BELOW
    look = {"len": 1.0, "x": 0, "y": 0, "yanchor": "top", "pad": {"t": bottom - _BELOW + 12, "b": 8}}
    look |= {"bordercolor": NEUTRAL, "tickcolor": NEUTRAL, "activebgcolor": NEUTRAL, "font": {"size": 11}}
    figure.update_layout(
        sliders=[
            {
                "active": len(names) - 1,
                "currentvalue": {"prefix": f"{label(title)} ", "font": {"size": 13}},
                "steps": [{"label": name, "method": "animate", "args": [[name], at_once]} for name in names],
                **look,
            }
        ],
        height=int(figure.layout.height or 380) + _BELOW,
        margin_b=bottom,
    )
    return figure


def _changing(figures: list[go.Figure]) -> list[list[dict[str, Any]]]:
    """Of each figure's traces, what differs between the figures: the rest is kept once, in the figure itself."""
    drawn = [[trace.to_plotly_json() for trace in figure.data] for figure in figures]
    varying: list[set[str]] = [set() for _ in drawn[-1]]
    for traces in drawn:
        for names, trace, last in zip(varying, traces, drawn[-1], strict=True):
            names |= {name for name, value in trace.items() if not _same(value, last.get(name))}
    return [
        [{name: trace[name] for name in trace if name in varying[i] | {"type"}} for i, trace in enumerate(traces)]
        for traces in drawn
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()  # NaN equals itself here
    return type(a) is type(b) and bool(a == b)


def _share_colours(figures: list[go.Figure]) -> None:
    """Give all heat maps, or all shared colour scales, the range that spans them."""
    maps = [trace for figure in figures for trace in figure.data if trace.type == "heatmap" and trace.zmin is not None]
    if maps:
        low, high = min(trace.zmin for trace in maps), max(trace.zmax for trace in maps)
        for trace in maps:
            trace.update(zmin=low, zmax=high)
    scales = [figure.layout.coloraxis for figure in figures if figure.layout.coloraxis.cmin is not None]
    if scales:
        low, high = min(scale.cmin for scale in scales), max(scale.cmax for scale in scales)
        for scale in scales:
            scale.update(cmin=low, cmax=high)


def _range(values: list[np.ndarray], log: bool) -> list[float] | None:
    """The ends of an axis, slightly beyond the values; the logarithms of both if it is logarithmic."""
    joined = np.concatenate([np.asarray(array, float) for array in values])
    shown = np.log10(joined[joined > 0]) if log else joined[np.isfinite(joined)]
    if not shown.size:
        return None
    beyond = _MARGIN * (np.ptp(shown) or 1.0)
    return [float(shown.min() - beyond), float(shown.max() + beyond)]
