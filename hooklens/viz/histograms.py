"""Histograms: how many values fall between each two edges."""

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Num
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.viz.drawing import log_axes, new_figure, number
from hooklens.viz.inputs import as_array
from hooklens.viz.text import label
from hooklens.viz.theme import POSITIVE

_FILL = "rgba(33, 102, 172, 0.35)"  # POSITIVE, paler


def histogram(
    counts: Num[Tensor, " bin"],
    edges: Num[Tensor, " edge"],
    title: str = "",
    *,
    x_title: str = "",
    y_title: str = "",
    log: str = "",
) -> go.Figure:
    """How are the values distributed? `counts` are the numbers between each two of the rising `edges`.

    >>> import torch
    >>> figure = histogram(torch.tensor([3, 1]), torch.tensor([0.1, 1.0, 10.0]), log="x")
    >>> figure.data[0].y, figure.layout.xaxis.type
    (array([3., 1., 1.]), 'log')

    `log` names the logarithmic axes ("x", "y" or "xy").
    """
    heights, sides = as_array(counts, "bin", "histogram"), as_array(edges, "edge", "histogram")
    if len(sides) != len(heights) + 1 or not len(heights) or not (np.diff(sides) > 0).all():
        raise InputError(
            f"histogram draws one count between each two edges, which rise; got {len(heights)} counts and "
            f"{len(sides)} edges; give one edge more than counts, in order"
        )
    if "x" in log and sides[0] <= 0:
        raise InputError(f"a logarithmic axis shows values above 0, got an edge at {number(sides[0])}; leave out log")
    # the outline of the bars: Plotly's own bars are as wide as on a linear axis, also on a logarithmic one
    boxes = [
        f"{number(a)} to {number(b)}<br>{label(y_title)} <b>{n:,.10g}</b>"
        for a, b, n in zip(sides[:-1], sides[1:], heights, strict=True)
    ]
    outline = go.Scatter(
        x=sides,
        y=np.append(heights, heights[-1]),
        mode="lines",
        line={"shape": "hv", "color": POSITIVE, "width": 1.5},
        fill="tozeroy",
        fillcolor=_FILL,
        text=[*boxes, boxes[-1]],
        hoverinfo="text",
    )
    return log_axes(new_figure([outline], title, x_title, y_title), log).update_layout(showlegend=False)
