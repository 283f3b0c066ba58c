"""Lines, scatter plots, and values compared with the draws of a null distribution."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Num
from torch import Tensor

from hooklens.viz.drawing import (
    above_zero,
    box,
    colour_bar,
    log_axes,
    mark,
    new_figure,
    number,
    span,
    uniform_ticks,
    whole_ticks,
)
from hooklens.viz.inputs import as_array, as_labels, as_series
from hooklens.viz.text import label
from hooklens.viz.theme import CYCLIC, NEUTRAL, POSITIVE, SEQUENTIAL, SERIES, plotly_scale


def lines(
    values: Mapping[str, Num[Tensor, " point"]],
    x: Num[Tensor, " point"] | Mapping[str, Num[Tensor, " point"]] | None = None,
    bands: Mapping[str, tuple[Num[Tensor, " point"], Num[Tensor, " point"]]] | None = None,
    title: str = "",
    *,
    x_title: str = "",
    y_title: str = "",
    marks: Mapping[str, float] | None = None,
    log: str = "",
) -> go.Figure:
    """How do these values change along x? One line per name; `bands` are (low, high) for names with an interval.

    >>> import torch
    >>> len(lines({"loss": torch.rand(3)}, bands={"loss": (torch.zeros(3), torch.ones(3))}).data)
    2

    `x` is shared by all lines, or given for each name. `log` names the logarithmic axes ("x", "y" or "xy"); values that
    such an axis cannot show, 0 and below, are gaps.
    """
    figure = log_axes(new_figure([], title, x_title, y_title), log)
    for index, (name, series) in enumerate(values.items()):
        places = x[name] if isinstance(x, Mapping) else x
        places = torch.arange(len(series)) if places is None else places
        at, array = as_series("lines", "point", x=places, values=series)
        at, array = above_zero(at, needed="x" in log), above_zero(array, needed="y" in log)
        colour = SERIES[index % len(SERIES)]
        if bands and name in bands:
            low, high = bands[name]
            _, lowest, highest = as_series("lines", "point", x=places, low=low, high=high)
            lowest, highest = (above_zero(end, needed="y" in log) for end in (lowest, highest))
            figure.add_trace(_band(at, lowest, highest, colour))
        shown = label(name) or "∅"
        boxes = [box(("", shown), (x_title, a), (y_title, b)) for a, b in zip(at, array, strict=True)]
        line = {"color": colour, "width": 2, "dash": ("solid", "dash", "dot")[index // len(SERIES) % 3]}
        figure.add_scatter(x=at, y=array, name=shown, line=line, text=boxes, hoverinfo="text", mode="lines")
    figure.update_layout(showlegend=len(values) > 1, margin_t=(76 if title else 36) + 24 * (len(values) > 1))
    return mark(whole_ticks(uniform_ticks(figure)), marks)


def scatter(
    x: Num[Tensor, " point"],
    y: Num[Tensor, " point"],
    labels: Sequence[object] | None = None,
    title: str = "",
    *,
    x_title: str = "",
    y_title: str = "",
    colour: Num[Tensor, " point"] | None = None,
    colourbar: str = "",
    cyclic: bool = False,
) -> go.Figure:
    """How are two numbers related? `labels` appear in the hover box; `colour` shows a third number.

    `cyclic` is for a third number whose largest value is next to its smallest, such as an angle.

    >>> import torch
    >>> scatter(torch.rand(4), torch.rand(4), ["a", "b", "c", "<i>"]).data[0].text[3].split("<br>")[0]
    '&lt;i&gt;'
    """
    across, up = as_series("scatter", "point", x=x, y=y)
    names = as_labels(labels, len(across), "point", "scatter")
    boxes = [box(("", n), (x_title, a), (y_title, b)) for n, a, b in zip(names, across, up, strict=True)]
    marker: dict = {"size": 7, "opacity": 0.8, "color": POSITIVE}
    if colour is not None:
        _, third = as_series("scatter", "point", x=x, colour=colour)
        low, high = span(third, False, 0.0)
        boxes = [f"{text}<br>{label(colourbar)} {number(c)}" for text, c in zip(boxes, third, strict=True)]
        marker |= {"color": third, "cmin": low, "cmax": high}
        scale = plotly_scale(CYCLIC if cyclic else SEQUENTIAL[1:])
        marker |= {"colorscale": scale, "colorbar": colour_bar(colourbar)}
    drawn = go.Scatter(x=across, y=up, mode="markers", marker=marker, text=boxes, hoverinfo="text")
    return new_figure([drawn], title, x_title, y_title, height=440)


def beside(
    values: Mapping[str, tuple[float, float, float]],
    null: Num[Tensor, " draw"],
    title: str = "",
    *,
    x_title: str = "",
    drawn: str = "random draws",
    marks: Mapping[str, float] | None = None,
) -> go.Figure:
    """Where do these values lie among draws of a null? Each of `found` is a value and its interval's ends (NaN: none).

    >>> import torch
    >>> figure = beside({"circuit": (0.6, 0.5, 0.7)}, torch.rand(100) / 2, marks={"the model": 1.0})
    >>> int(sum(figure.data[0].y)), figure.data[1].x
    (100, (0.6,))

    `marks` are named vertical lines. Draws that are NaN or infinite are not shown, and their number is reported.
    """
    draws = as_array(null, "draw", "beside")
    finite = draws[np.isfinite(draws)]
    counts, edges = np.histogram(finite, bins=min(30, max(1, len(finite))))
    middles, wide = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
    boxes = [f"{number(a)} to {number(b)}: {n}" for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
    missing = f", {len(draws) - len(finite)} undefined" if len(finite) < len(draws) else ""
    look = {"marker": {"color": NEUTRAL, "opacity": 0.55}, "name": f"{label(drawn)} ({len(draws)}{missing})"}
    bars = go.Bar(x=middles, y=counts, width=wide, hovertext=boxes, hoverinfo="text", **look)
    figure, tall = new_figure([bars], title, x_title, "draws"), max(1, int(counts.max()))
    for index, (name, (value, low, high)) in enumerate(values.items()):
        known = np.isfinite([low, high]).all()
        ends = {"array": [high - value], "arrayminus": [value - low], "thickness": 2, "width": 6} if known else {}
        shown = f"{label(name)} {number(value)}" + (f" [{number(low)}, {number(high)}]" if known else "")
        marker = {"size": 11, "symbol": "diamond", "color": SERIES[index % len(SERIES)]}
        at = {"x": [value], "y": [tall * (1.12 + 0.14 * index)]}
        figure.add_scatter(
            **at, error_x=ends, marker=marker, name=shown, text=[shown], hoverinfo="text", mode="markers"
        )
    for name, value in (marks or {}).items():
        line = {"color": NEUTRAL, "width": 1.2, "dash": "dash"}
        figure.add_vline(x=float(value), line=line, annotation={"text": label(name), "font": {"size": 11}})
    return figure.update_layout(showlegend=True, margin_t=(76 if title else 36) + 24, bargap=0)


def _band(at: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> go.Scatter:
    around = {"x": np.concatenate([at, at[::-1]]), "y": np.concatenate([high, low[::-1]])}
    look = {"fill": "toself", "fillcolor": colour, "opacity": 0.18, "mode": "none"}
    return go.Scatter(**around, **look, hoverinfo="skip", showlegend=False)
