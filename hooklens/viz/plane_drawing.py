"""Functions on the plane: maps side by side, and a square cut into polygons."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Num
from plotly.subplots import make_subplots
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.viz.drawing import box, colour_bar, new_figure, span
from hooklens.viz.inputs import as_array, as_labels, same_length
from hooklens.viz.text import label
from hooklens.viz.theme import DIVERGING, INK, NEUTRAL, SEQUENTIAL, colour_at, plotly_scale, template

_SIDE, _GAP = 190, 44  # pixels of a map, and between two rows of maps
_COLUMNS = 4


def plane_maps(
    values: Num[Tensor, "map y x"],
    places: Num[Tensor, " x"],
    names: Sequence[str] | None = None,
    title: str = "",
    *,
    boundaries: Num[Tensor, "map y x"] | None = None,
    points: Num[Tensor, "point 2"] | None = None,
) -> go.Figure:
    """What value has each of these functions over a square? A grid of maps, each with its own scale.

    >>> figure = plane_maps(torch.rand(2, 5, 5), torch.linspace(-1, 1, 5), ["L0N0", "L0N1"])
    >>> [trace.type for trace in figure.data]
    ['heatmap', 'heatmap']

    Colours reach from minus to plus the largest absolute value of each map; 0 is white. `places` are the coordinates
    along both axes. A line is drawn where `boundaries` is 0; `points` are on all maps.
    """
    array, at = as_array(values, "map y x", "plane_maps"), as_array(places, "x", "plane_maps")
    if array.shape[1:] != (len(at), len(at)) or len(array) == 0:
        raise InputError(
            f"plane_maps draws square maps [map y x] with a place for each row and column, got shape "
            f"{list(array.shape)} and {len(at)} places"
        )
    lines = None if boundaries is None else as_array(boundaries, "map y x", "plane_maps")
    marked = None if points is None else as_array(points, "point axis", "plane_maps")
    titles = as_labels(names, len(array), "map", "plane_maps")
    ncols = min(_COLUMNS, len(array))
    nrows = -(-len(array) // ncols)
    inside = nrows * _SIDE + (nrows - 1) * _GAP
    figure = make_subplots(
        nrows, ncols, subplot_titles=titles, horizontal_spacing=0.04, vertical_spacing=_GAP / inside if nrows > 1 else 0
    )
    for index, surface in enumerate(array):
        place = {"row": index // ncols + 1, "col": index % ncols + 1}
        low, high = span(surface, True, 0.0)
        look = {"colorscale": plotly_scale(DIVERGING), "zmin": low, "zmax": high, "showscale": False}
        drawn = go.Heatmap(z=surface, x=at, y=at, name=titles[index], hoverinfo="x+y+z+name", **look)
        figure.add_trace(drawn, **place)
        if lines is not None and np.nanmin(lines[index]) < 0 < np.nanmax(lines[index]):
            figure.add_trace(_boundary(lines[index], at), **place)
        if marked is not None and len(marked):
            look = {"mode": "markers", "marker": {"size": 2.5, "color": NEUTRAL, "opacity": 0.6}, "hoverinfo": "skip"}
            figure.add_trace(go.Scatter(x=marked[:, 0], y=marked[:, 1], showlegend=False, **look), **place)
    top = 96 if title else 46
    figure.update_layout(template=template(), height=inside + top + 48, margin_t=top)
    figure.update_layout(title={"text": label(title, 160)}, showlegend=False)
    ends = [float(at[0]), float(at[-1])]
    figure.update_xaxes(range=ends, showgrid=False, zeroline=False, nticks=3)
    figure.update_yaxes(range=ends, showgrid=False, zeroline=False, nticks=3)
    return figure.update_annotations(font_size=13)


def polygons(
    corners: Sequence[Num[Tensor, "_corner 2"]],
    values: Sequence[float | int],
    title: str = "",
    *,
    colourbar: str = "",
) -> go.Figure:
    """Into which polygons is the plane cut? Each is coloured by its value.

    >>> triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> len(polygons([triangle, 1 - triangle], [0, 1], colourbar="neurons on").data)
    3
    """
    same_length("polygons", corners=corners, values=values)
    shapes = [as_array(shape, "corner axis", "polygons") for shape in corners]
    numbers = as_array(torch.tensor(values, dtype=torch.float64), "polygon", "polygons")
    low, high = span(numbers, False, 0.0)
    traces: list = []
    for value in np.unique(numbers):
        same = [shape for shape, number in zip(shapes, numbers, strict=True) if number == value]
        outlines = [np.vstack([shape, shape[:1], [[np.nan, np.nan]]]) for shape in same]  # NaN: lift the pen
        around = np.vstack(outlines)
        look = {"fill": "toself", "fillcolor": colour_at(SEQUENTIAL, (value - low) / (high - low))}
        line = {"color": INK, "width": 0.7}
        text = box((colourbar, float(value)))
        traces.append(
            go.Scatter(x=around[:, 0], y=around[:, 1], mode="lines", line=line, text=text, hoverinfo="text", **look)
        )
    scale = {"colorscale": plotly_scale(SEQUENTIAL), "cmin": low, "cmax": high, "color": [low]}
    marker = scale | {"colorbar": colour_bar(colourbar), "size": 0.1}
    traces.append(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, hoverinfo="skip"))
    figure = new_figure(traces, title, "x", "y", height=560)
    figure.update_yaxes(scaleanchor="x", constrain="domain", zeroline=False)
    return figure.update_xaxes(constrain="domain", zeroline=False).update_layout(showlegend=False)


def _boundary(surface: np.ndarray, at: np.ndarray) -> go.Contour:
    """The line along which a function is 0."""
    contours = {"start": 0, "end": 0, "size": 1, "coloring": "none"}
    return go.Contour(
        z=surface, x=at, y=at, contours=contours, line={"color": INK, "width": 1.5}, showscale=False, hoverinfo="skip"
    )
