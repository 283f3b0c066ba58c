"""A layered graph: boxes in rows from bottom to top, and arrows whose width is a score and whose colour is its sign."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from hooklens.core.errors import InputError
from hooklens.viz.drawing import box, new_figure
from hooklens.viz.text import label
from hooklens.viz.theme import INK, NEGATIVE, NEUTRAL, POSITIVE

_WIDTHS = (0.7, 1.2, 2.0, 3.0, 4.4, 6.2)  # pixels, from the smallest score to the largest
_BOX, _FILL = (0.4, 0.26), "#eef2f7"  # half a box's width and height, in columns and rows
_PORTS = {"q": -0.22, "k": 0.0, "v": 0.22}
_POINTS = np.linspace(0.0, 1.0, 17)[:, None]


def layered_graph(
    rows: Mapping[str, Sequence[str]],
    edges: Sequence[tuple[str, str, float]],
    title: str = "",
    *,
    ties: Sequence[tuple[str, str]] = (),
    score: str = "score",
) -> go.Figure:
    """Which boxes send information to which? `rows` are the boxes per level, the lowest first; edges (from, to, score).

    >>> figure = layered_graph({"in": ["a"], "out": ["<b>"]}, [("a", "<b>.q", -1.0)])
    >>> [trace.name for trace in figure.data if trace.showlegend], figure.layout.annotations[1].text
    (['lowers the metric'], '&lt;b&gt;')

    An edge to `name.q`, `name.k` or `name.v` ends at the left, middle or right of the box `name`. `ties` are boxes that
    belong together, joined by a grey line.
    """
    places = _places(rows)
    largest = max((abs(value) for *_, value in edges), default=0.0) or 1.0
    groups: dict[tuple[bool, int], list[np.ndarray]] = {}
    middles, boxes = [np.array(list(places.values())).reshape(-1, 2)], [label(name) for name in places]
    for start, end, value in sorted(edges, key=lambda edge: abs(edge[2])):
        curve = _curve(*_ends(places, start, end))
        width = min(int(len(_WIDTHS) * (abs(value) / largest) ** 0.5), len(_WIDTHS) - 1)
        groups.setdefault((value < 0, width), []).append(curve)
        middles.append(curve[[5, 8, 11]])
        boxes += [box(("", f"{label(start)} → {label(end)}"), (score, value))] * 3
    traces = [_tie(places, *tie) for tie in ties]
    named: set[bool] = set()
    for (below, width), curves in sorted(groups.items(), reverse=True, key=lambda item: item[0][1]):
        traces.append(_lines(curves, below, width, first=below not in named))
        named.add(below)
    at, marker = np.concatenate(middles), {"size": 10, "opacity": 0.0}
    traces.append(
        go.Scatter(
            x=at[:, 0], y=at[:, 1], mode="markers", marker=marker, text=boxes, hoverinfo="text", showlegend=False
        )
    )
    figure = new_figure(traces[::-1], title, "", "", height=int(min(max(46 * len(rows) + 150, 330), 2400)))
    return _with_boxes(figure, rows, places)


def _places(rows: Mapping[str, Sequence[str]]) -> dict[str, tuple[float, float]]:
    places: dict[str, tuple[float, float]] = {}
    for height, names in enumerate(rows.values()):
        for i, name in enumerate(names):
            if name in places:
                raise InputError(f"layered_graph got the box {name!r} twice; box names must be unique")
            places[name] = (i - (len(names) - 1) / 2, float(height))
    return places


def _ends(places: Mapping[str, tuple[float, float]], start: str, end: str) -> tuple[np.ndarray, np.ndarray]:
    """The top side of the box that an edge leaves, and the bottom side of the box that it enters."""
    into, _, port = (end, "", "") if end in places else end.rpartition(".")
    for name in (start, into):
        if name not in places:
            raise InputError(f"layered_graph got an edge {start!r} to {end!r}, but there is no box named {name!r}")
    a, b = np.array(places[start]), np.array(places[into])
    return a + np.array([0, _BOX[1]]), b + np.array([_PORTS.get(port, 0.0), -_BOX[1]])


def _curve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A cubic curve with vertical ends; one across many rows bends outwards, past the boxes between."""
    rise = b[1] - a[1]
    bow = 0.0 if rise < 1.5 else math.copysign(0.55 + 0.05 * min(rise, 12), a[0] + b[0])
    c, d = a + np.array([bow, 0.45 * rise]), b + np.array([bow, -0.45 * rise])
    t = _POINTS
    return (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * c + 3 * t**2 * (1 - t) * d + t**3 * b


def _lines(curves: Sequence[np.ndarray], below: bool, width: int, *, first: bool) -> go.Scatter:
    gap = np.full((1, 2), np.nan)
    at = np.concatenate([part for curve in curves for part in (curve, gap)])
    return go.Scatter(
        x=at[:, 0],
        y=at[:, 1],
        mode="lines",
        line={"color": NEGATIVE if below else POSITIVE, "width": _WIDTHS[width]},
        opacity=0.35 + 0.1 * width,
        hoverinfo="skip",
        name="lowers the metric" if below else "raises the metric",
        legendgroup=str(below),
        showlegend=first,
    )


def _tie(places: Mapping[str, tuple[float, float]], start: str, end: str) -> go.Scatter:
    (x0, y0), (x1, y1) = places[start], places[end]
    line = {"color": NEUTRAL, "width": 1, "dash": "dot"}
    return go.Scatter(x=[x0, x1], y=[y0, y1], mode="lines", line=line, hoverinfo="skip", showlegend=False)


def _with_boxes(
    figure: go.Figure, rows: Mapping[str, Sequence[str]], places: Mapping[str, tuple[float, float]]
) -> go.Figure:
    """Draw boxes over the arrows, with names in them, and the levels' names at the left."""
    wide, high = _BOX
    figure.update_layout(
        shapes=[
            {"type": "rect", "x0": x - wide, "x1": x + wide, "y0": y - high, "y1": y + high, "fillcolor": _FILL}
            | {"line": {"color": NEUTRAL, "width": 1}, "layer": "above"}
            for x, y in places.values()
        ],
        annotations=[
            {"x": x, "y": y, "text": label(name, 14), "showarrow": False, "font": {"size": 11, "color": INK}}
            for name, (x, y) in places.items()
        ],
        margin={"t": 100 if figure.layout.title.text else 60, "b": 16},
    )
    reach = max((abs(x) for x, _ in places.values()), default=0.0) + 1.2
    figure.update_xaxes(visible=False, range=[-reach, reach])
    names = [label(name, 18) for name in rows]
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, showgrid=False, zeroline=False)
    return figure.update_yaxes(range=[-0.6, len(names) - 0.4])
