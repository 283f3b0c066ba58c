"""Several figures combined into one, below each other."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hooklens.viz.theme import template

_GAP = 128  # pixels between two panels: a title, a one-row legend and the axis labels and title above
_ROW = 20  # pixels per additional row of a legend


def panels(figures: Sequence[go.Figure]) -> go.Figure:
    """Stack the figures, each with its own axes, title and legend; heat maps have their colour bars beside them.

    >>> import torch
    >>> from hooklens.viz.curves import lines
    >>> both = panels([lines({"a": torch.rand(3)}, title="A"), lines({"b": torch.rand(3)}, title="B")])
    >>> len(both.data), [note.text for note in both.layout.annotations]
    (2, ['A', 'B'])
    """
    sizes = [int(figure.layout.height or 380) for figure in figures]
    rows = [_legend_rows(figure) for figure in figures]
    gap = _GAP + _ROW * (max(rows) - 1)
    total = sum(sizes) + gap * (len(figures) - 1)
    titles = [figure.layout.title.text or "" for figure in figures]
    stacked = make_subplots(
        rows=len(figures), cols=1, row_heights=sizes, vertical_spacing=gap / total, subplot_titles=titles
    )
    stacked.update_layout(template=template(), height=total, margin={"t": 76 + _ROW * (rows[0] - 1), "b": 48})
    stacked.update_annotations(x=0, xanchor="left", font={"size": 15})
    titled = [n for n, text in zip(rows, titles, strict=True) if text]
    for title, n in zip(stacked.layout.annotations, titled, strict=True):
        title.yshift = 24 + _ROW * (n - 1)  # above the legend
    for row, figure in enumerate(figures, 1):
        legend = "legend" if row == 1 else f"legend{row}"
        bottom, top = stacked.layout["yaxis" if row == 1 else f"yaxis{row}"].domain
        for trace in figure.data:
            drawn = go.Figure([trace]).data[0].update(legend=legend)
            drawn.showlegend = figure.layout.showlegend if trace.showlegend is None else trace.showlegend
            # by default all colour bars lie upon each other, at the height of the page
            for bar in [drawn.colorbar] if drawn.type == "heatmap" else _colour_bars(drawn):
                bar.update(y=(bottom + top) / 2, yanchor="middle", len=top - bottom, lenmode="fraction")
            stacked.add_trace(drawn, row=row, col=1)
        for kind, update in (("x", stacked.update_xaxes), ("y", stacked.update_yaxes)):
            axis = figure.layout[f"{kind}axis"].to_plotly_json()
            update(row=row, col=1, **{name: value for name, value in axis.items() if name not in ("domain", "anchor")})
        for shape in figure.layout.shapes:
            stacked.add_shape(shape.to_plotly_json() | _moved(shape, row))  # the figure given keeps its own
        for note in figure.layout.annotations:
            stacked.add_annotation(note.to_plotly_json() | _moved(note, row))
        stacked.update_layout({legend: {"orientation": "h", "x": 0, "y": top, "yanchor": "bottom", "xanchor": "left"}})
    return stacked


def _colour_bars(trace: Any) -> list[Any]:
    """The colour bar of points whose colour is a number."""
    return [trace.marker.colorbar] if trace.type == "scatter" and trace.marker.colorbar.thickness else []


def _moved(drawn: Any, row: int) -> dict[str, str]:
    """The axes of a shape or a note, as those of a row."""
    number = "" if row == 1 else str(row)
    axes = {"xref": drawn.xref or "x", "yref": drawn.yref or "y"}
    return {name: axis[0] + number + axis[1:] for name, axis in axes.items()}


def _legend_rows(figure: go.Figure) -> int:
    """The number of rows of a legend on a page of 1,000 pixels: all entries are as wide as the longest."""
    names = [trace.name or "" for trace in figure.data if trace.showlegend is not False]
    if not names or figure.layout.showlegend is False:
        return 1
    return -(-len(names) // max(1, int(980 / (6.5 * max(map(len, names)) + 40))))
