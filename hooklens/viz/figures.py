"""Heat maps and bars: they draw the given values and compute nothing."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Num
from torch import Tensor

from hooklens.viz.drawing import box, colour_bar, mark, new_figure, number, span
from hooklens.viz.inputs import as_array, as_labels, as_series, same_length, ticks
from hooklens.viz.theme import DIVERGING, NEGATIVE, NEUTRAL, POSITIVE, SEQUENTIAL, plotly_scale

_IN_CELL = 9  # characters that fit a cell
_LONGEST = 24  # characters of a tick label: a longer one would take too much room


def heatmap(
    values: Num[Tensor, "y x"],
    *,
    x: Sequence[object] | None = None,
    y: Sequence[object] | None = None,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    hover: Sequence[Sequence[object]] | None = None,
    diverging: bool = True,
    colourbar: str = "",
    zmid: float = 0.0,
    cells: Sequence[Sequence[object]] | None = None,
) -> go.Figure:
    """Where in the grid are the large values? Row 0 is on top; `hover` adds a line of text to each cell's box.

    A tuple in `hover` gives several lines. `cells` are short texts written into the cells, such as tokens.

    >>> import torch
    >>> figure = heatmap(torch.tensor([[1.0, -2.0]]), x=["the", "the"], y_title="layer")
    >>> figure.data[0].zmin, figure.data[0].zmax, list(figure.layout.xaxis.ticktext)
    (-2.0, 2.0, ['the', 'the'])

    A diverging scale is centred at `zmid` and symmetric; otherwise colours span the values. Cells that are NaN or
    infinite stay empty.
    """
    array = as_array(values, "y x", "heatmap")
    rows = as_labels(y, len(array), "y", "heatmap", _LONGEST)
    columns = as_labels(x, array.shape[1], "x", "heatmap", _LONGEST)
    low, high = span(array, diverging, zmid)
    boxes = [
        [box((y_title, row), (x_title, column), (colourbar, z)) for column, z in zip(columns, line, strict=True)]
        for row, line in zip(rows, array, strict=True)
    ]
    if hover is not None:
        same_length("heatmap", rows=array, hover=hover)
        extra = [_lines(line, array.shape[1]) for line in hover]
        boxes = [[f"{a}<br>{b}" for a, b in zip(*pair, strict=True)] for pair in zip(boxes, extra, strict=True)]
    colours = plotly_scale(DIVERGING if diverging else SEQUENTIAL)
    bar = colour_bar(colourbar)
    drawn = go.Heatmap(z=array, zmin=low, zmax=high, colorscale=colours, text=boxes, hoverinfo="text", colorbar=bar)
    if cells is not None:
        same_length("heatmap", rows=array, cells=cells)
        written = [as_labels(line, array.shape[1], "x", "cells", _IN_CELL) for line in cells]
        drawn.update(hovertext=boxes, text=written, texttemplate="%{text}", textfont={"size": 10})
    # a readable height for each row, within the size of a screen
    height = 130 + int(min(max(len(array) * (28 if len(array) <= 16 else 20), 110), 620))
    figure = new_figure([drawn], title, x_title, y_title, height=height)
    figure.update_traces(xgap=1, ygap=1, selector=lambda _: array.size <= 4000)
    figure.update_xaxes(
        **ticks(columns), **_slant(columns), showgrid=False, zeroline=False, range=[-0.5, array.shape[1] - 0.5]
    )
    return figure.update_yaxes(**ticks(rows, 40), showgrid=False, zeroline=False, range=[len(array) - 0.5, -0.5])


def bars(
    values: Num[Tensor, " bar"],
    low: Num[Tensor, " bar"] | None = None,
    high: Num[Tensor, " bar"] | None = None,
    labels: Sequence[object] | None = None,
    title: str = "",
    *,
    x_title: str = "",
    y_title: str = "",
    marks: Mapping[str, float] | None = None,
) -> go.Figure:
    """How large is each value, and how certain? `low` and `high` are the ends of the intervals, drawn as whiskers.

    >>> import torch
    >>> figure = bars(torch.tensor([1.0, -2.0]), torch.tensor([0.5, -3.0]), torch.tensor([1.5, -1.0]), ["L0", "L1"])
    >>> [trace.type for trace in figure.data]
    ['bar', 'scatter']

    An interval whose ends are NaN is not drawn. `marks` are named horizontal lines, such as the clean and the corrupted
    baseline.
    """
    array = as_array(values, "bar", "bars")
    names = as_labels(labels, len(array), "bar", "bars", _LONGEST)
    boxes = [box((x_title, name), (y_title, value)) for name, value in zip(names, array, strict=True)]
    colours = [NEGATIVE if value < 0 else POSITIVE for value in array]
    traces: list = [go.Bar(y=array, marker={"color": colours}, hovertext=boxes, hoverinfo="text")]
    if low is not None and high is not None and bool(low.isfinite().any()):
        _, *ends = as_series("bars", "bar", values=values, low=low, high=high)
        boxes = [f"{text}<br>[{number(a)}, {number(b)}]" for text, a, b in zip(boxes, *ends, strict=True)]
        traces = [traces[0].update(hovertext=boxes), _whiskers(*ends)]
    figure = new_figure(traces, title, x_title, y_title)
    figure.update_layout(showlegend=False, bargap=0.25)
    figure.update_xaxes(**ticks(names), **_slant(names), showgrid=False, zeroline=False, range=[-0.6, len(array) - 0.4])
    return mark(figure, marks)


def _lines(cells: Sequence[object], count: int) -> list[str]:
    """Additional lines of the hover box for each cell of a row."""
    same_length("hover", columns=range(count), cells=cells)
    texts = [cell if isinstance(cell, tuple | list) else (cell,) for cell in cells]
    return ["<br>".join(as_labels(lines, len(lines), "line", "hover")) for lines in texts]


def _slant(labels: list[str]) -> dict:
    """Long labels are vertical: a slanted label at the left edge would not fit, and Plotly would omit it."""
    return {"autotickangles": [0, -90] if max(map(len, labels), default=0) > 12 else [0, -45, -90]}


def _whiskers(low: np.ndarray, high: np.ndarray) -> go.Scatter:
    """Intervals around their own midpoint, so that they are correct even if the value lies outside."""
    error = {"type": "data", "array": (high - low) / 2, "thickness": 1.5, "width": 4, "color": NEUTRAL}
    invisible = {"opacity": 0}
    return go.Scatter(y=(high + low) / 2, error_y=error, mode="markers", marker=invisible, hoverinfo="skip")
