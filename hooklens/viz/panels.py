"""Several figures in one, below each other."""

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hooklens.viz.theme import template

_GAP = 110  # pixels between two panels, for a title, a legend and the labels of the axis above


def panels(figures: Sequence[go.Figure]) -> go.Figure:
    """The figures below each other, each with its own axes, title and legend.

    >>> import torch
    >>> from hooklens.viz.curves import lines
    >>> both = panels([lines({"a": torch.rand(3)}, title="A"), lines({"b": torch.rand(3)}, title="B")])
    >>> len(both.data), [note.text for note in both.layout.annotations]
    (2, ['A', 'B'])
    """
    sizes = [int(one.layout.height or 380) for one in figures]
    total = sum(sizes) + _GAP * (len(figures) - 1)
    titles = [one.layout.title.text or "" for one in figures]
    made = make_subplots(
        rows=len(figures), cols=1, row_heights=sizes, vertical_spacing=_GAP / total, subplot_titles=titles
    )
    made.update_layout(template=template(), height=total, margin={"t": 76, "b": 48})
    made.update_annotations(x=0, xanchor="left", yshift=24, font={"size": 15})
    for row, one in enumerate(figures, 1):
        legend = "legend" if row == 1 else f"legend{row}"
        for trace in one.data:
            drawn = go.Figure([trace]).data[0].update(legend=legend)
            drawn.showlegend = one.layout.showlegend if trace.showlegend is None else trace.showlegend
            made.add_trace(drawn, row=row, col=1)
        for kind, update in (("x", made.update_xaxes), ("y", made.update_yaxes)):
            axis = one.layout[f"{kind}axis"].to_plotly_json()
            update(row=row, col=1, **{name: value for name, value in axis.items() if name not in ("domain", "anchor")})
        place = {"xref": "x domain", "yref": "y"} if row == 1 else {"xref": f"x{row} domain", "yref": f"y{row}"}
        for shape in one.layout.shapes:
            made.add_shape(shape.update(place))
        for note in one.layout.annotations:
            made.add_annotation(note.update(place))
        top = made.layout["yaxis" if row == 1 else f"yaxis{row}"].domain[1]
        made.update_layout({legend: {"orientation": "h", "x": 0, "y": top, "yanchor": "bottom", "xanchor": "left"}})
    return made
