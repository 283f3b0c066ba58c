"""Building blocks of all figures."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from hooklens.core.errors import InputError
from hooklens.results.table import format_number
from hooklens.viz.text import label
from hooklens.viz.theme import NEUTRAL, limits, template

_PLACES = ("top right", "top left", "bottom right", "bottom left")
_SHORT = (1e-4, 1e5)  # between these, a logarithmic axis has decimals
_DECIMAL, _POWER = "~g", "~e"  # 0.01, 1, 100; and 1e-8, 1e+0
_FEW = 12  # whole numbers that are all written
_BEHIND = "rgba(255, 255, 255, 0.72)"  # behind a name on bars or lines
_NEAR = 0.06  # height of a line of text, as a share of the figure's


def new_figure(traces: list, title: str, x_title: str, y_title: str, height: int = 380) -> go.Figure:
    figure = go.Figure(traces, layout={"template": template(), "height": height})
    figure.update_layout(title={"text": label(title, 160)}, margin_t=76 if title else 36)
    return figure.update_xaxes(title_text=label(x_title)).update_yaxes(title_text=label(y_title))


def colour_bar(title: str) -> dict:
    """The colour scale beside a figure."""
    return {
        "title": {"text": label(title), "side": "right", "font": {"size": 12.5}},
        "thickness": 12,
        "outlinewidth": 0,
        "tickfont": {"size": 11},
        "ypad": 0,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "rgba(0,0,0,0)",
    }


def span(array: np.ndarray, diverging: bool, middle: float) -> tuple[float, float]:
    finite = array[np.isfinite(array)]
    ends = (float(finite.min()), float(finite.max())) if finite.size else (middle, middle)
    return limits(*ends, diverging=diverging, middle=middle)


def box(*lines: tuple[str, object]) -> str:
    """A hover box with one "name value" per line. Text values must be escaped already."""
    shown = [(label(name), value if isinstance(value, str) else number(value)) for name, value in lines]
    texts = [f"{name} <b>{value}</b>" if name else value for name, value in shown]
    return "<br>".join(texts)


def number(value: Any) -> str:
    return format_number(float(value)).removesuffix(".0000")


def log_axes(figure: go.Figure, log: str) -> go.Figure:
    """Make the axes that `log` names ("x", "y" or "xy") logarithmic."""
    if not set(log) <= {"x", "y"}:
        raise InputError(f'log names the logarithmic axes: "", "x", "y" or "xy"; got {log!r:.80}')
    look = {"type": "log", "tickfont": {"size": 12.5}}  # Plotly writes the digits between two powers 25 % smaller
    figure.update_xaxes(look | {"exponentformat": "none", "separatethousands": True} if "x" in log else {})
    return figure.update_yaxes(look | {"tickformat": _DECIMAL} if "y" in log else {})


def uniform_ticks(figure: go.Figure) -> go.Figure:
    """Write the numbers beside a logarithmic y axis in one way, powers of ten where decimals would be long.

    Plotly's own powers are 10^-1 beside 1 and 10. 2 and 5 between powers of ten: all nine digits would meet.
    """
    if figure.layout.xaxis.type == "log":
        across = _positive(figure, "x")
        if across.size and 1 < np.log10(across.max() / across.min()) < 4.5:
            figure.update_xaxes(dtick="D2")
    if figure.layout.yaxis.type != "log":
        return figure
    drawn = _positive(figure, "y")
    if drawn.size and 0.9 < np.log10(drawn.max() / drawn.min()) < 3:
        figure.update_yaxes(dtick="D2")
    short = not drawn.size or (drawn.min() >= _SHORT[0] and drawn.max() <= _SHORT[1])
    return figure.update_yaxes(tickformat=_DECIMAL if short else _POWER)


def whole_ticks(figure: go.Figure) -> go.Figure:
    """Write only whole numbers below a few of them, such as layers: Plotly would write 0.5 and 1.5 between."""
    across = _drawn(figure, "x")
    if across.size and bool((across == across.round()).all()) and 0 < np.ptp(across) <= _FEW:
        figure.update_xaxes(dtick=1 if figure.layout.xaxis.type != "log" else figure.layout.xaxis.dtick)
    return figure


def _drawn(figure: go.Figure, axis: str) -> np.ndarray:
    """All finite numbers of the traces along an axis."""
    values = [np.asarray(trace[axis], float) for trace in figure.data if trace[axis] is not None]
    drawn = np.concatenate([np.empty(0), *values])
    return drawn[np.isfinite(drawn)]


def _positive(figure: go.Figure, axis: str) -> np.ndarray:
    """All numbers of the traces along an axis that a logarithm has."""
    drawn = _drawn(figure, axis)
    return drawn[drawn > 0]


def above_zero(array: np.ndarray, *, needed: bool) -> np.ndarray:
    """The values that a logarithmic axis can show; the others become gaps."""
    return np.where(array > 0, array, np.nan) if needed else array


def mark_steps(figure: go.Figure, marks: Mapping[str, int]) -> go.Figure:
    """Named vertical lines; names that would meet are written at different heights."""
    log = figure.layout.xaxis.type == "log"
    for i, (name, value) in enumerate((name, value) for name, value in marks.items() if value > 0 or not log):
        note = {"text": label(name), "font": {"size": 11, "color": NEUTRAL}, "yshift": -16 * (i % 2)}
        figure.add_vline(x=value, line={"color": NEUTRAL, "width": 1.2, "dash": "dash"}, annotation=note)
        if log:  # as in `mark`
            figure.layout.annotations[-1].x = float(np.log10(value))
    return figure


def mark(figure: go.Figure, marks: Mapping[str, float] | None) -> go.Figure:
    """Named horizontal lines; the name of a line close to another is placed elsewhere along it."""
    log = figure.layout.yaxis.type == "log"
    marks = {name: value for name, value in (marks or {}).items() if value > 0 or not log}
    places = np.array([float(value) for value in marks.values()])
    drawn = np.concatenate([places, *(np.asarray(trace.y, float) for trace in figure.data if trace.y is not None)])
    heights, drawn = (np.log10(places), np.log10(drawn)) if log else (places, drawn)
    near = _NEAR * np.ptp(drawn[np.isfinite(drawn)]) if np.isfinite(drawn).any() else 0.0
    for i, (name, value) in enumerate(zip(marks, places, strict=True)):
        figure.add_hline(
            y=value,
            line={"color": NEUTRAL, "width": 1.2, "dash": "dash"},
            annotation={"text": label(name), "font": {"size": 11, "color": NEUTRAL}, "bgcolor": _BEHIND},
            annotation_position=_PLACES[sum(abs(heights[i] - other) <= near for other in heights[:i]) % len(_PLACES)],
        )
        if log:  # Plotly places lines by their value, and annotations by its logarithm
            figure.layout.annotations[-1].y = heights[i]
    return figure
