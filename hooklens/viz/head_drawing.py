"""Attention patterns of several heads side by side."""

import textwrap
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Num
from plotly.subplots import make_subplots
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.viz.drawing import colour_bar
from hooklens.viz.inputs import as_array, as_labels, ticks
from hooklens.viz.text import label, token_labels
from hooklens.viz.theme import SEQUENTIAL, limits, plotly_scale, template

_GAP, _LINE = 26, 18  # pixels between two rows, and per line of a head's name above each
_NAME = 60  # maximum characters of a head's name over all its lines
_LETTER, _NARROWEST = 7, 400  # pixels per letter, and total width of the maps on the narrowest page


def attention_heads(
    patterns: Num[Tensor, "head query_pos key_pos"],
    str_tokens: Sequence[str],
    names: Sequence[str] | None = None,
    ncols: int = 3,
    *,
    title: str = "",
) -> go.Figure:
    """Where does each of these heads attend? A grid of heat maps, query down and key across, with one colour scale.

    >>> import torch
    >>> figure = attention_heads(torch.eye(3).expand(2, 3, 3), ["<s>", " a", " a"], ["L0H1", "L5H3"])
    >>> len(figure.data), list(figure.layout.xaxis.ticktext)
    (2, ['&lt;s&gt;', '·a', '·a'])

    The number of keys must equal the number of tokens; queries are the last tokens.
    """
    array = as_array(patterns, "head query_pos key_pos", "attention_heads")
    heads, queries, keys = array.shape
    if keys != len(str_tokens) or queries > keys or ncols < 1 or heads == 0:
        raise InputError(
            "attention_heads needs one token per key, and at least one column and head; got patterns "
            f"{list(array.shape)} [head query_pos key_pos], {len(str_tokens)} tokens, ncols={ncols}; pass the "
            "tokens that the model ran on"
        )
    called = names if names is not None else [str(i) for i in range(heads)]
    names = as_labels(names, heads, "head", "attention_heads")
    ncols = min(ncols, heads)
    nrows = -(-heads // ncols)
    titles = [_wrapped(str(name), ncols) for name in called]
    above = _LINE * max(title.count("<br>") + 1 for title in titles)
    side = {1: 480, 2: 400}.get(ncols, 800 // ncols)  # roughly square on a page of typical width
    inside = nrows * side + (nrows - 1) * (_GAP + above)
    spacing = {"horizontal_spacing": 0.03, "vertical_spacing": (_GAP + above) / inside}
    figure = make_subplots(nrows, ncols, subplot_titles=titles, **spacing)
    tokens = token_labels(str_tokens)
    for index, pattern in enumerate(array):
        place = {"row": index // ncols + 1, "col": index % ncols + 1}
        figure.add_trace(_map(pattern, tokens, names[index]), **place)
        _axes(figure, tokens, queries, place, has_below=index + ncols < heads)
    top = (70 if title else 22) + above
    figure.update_layout(template=template(), coloraxis=_colours(array), height=inside + top + 96)
    figure.update_layout(title={"text": label(title, 160)}, margin_t=top)
    return figure.update_annotations(font_size=13)


def _wrapped(name: str, ncols: int) -> str:
    """Wrap a head's name into lines that do not reach into the next map, even on a narrow page."""
    shown = name if len(name) <= _NAME else name[: _NAME - 1] + "…"
    lines = textwrap.wrap(shown, _NARROWEST // (_LETTER * ncols), drop_whitespace=True) or [shown]
    return "<br>".join(label(line) or "∅" for line in lines)


def _colours(array: np.ndarray) -> dict:
    """One scale for all heads: from 0, or from below if unnormalised attention is negative."""
    seen = array[np.isfinite(array)]
    low, high = limits(float(seen.min(initial=0.0)), float(seen.max(initial=0.0)), diverging=False)
    return {"colorscale": plotly_scale(SEQUENTIAL), "cmin": low, "cmax": high, "colorbar": colour_bar("attention")}


def _map(pattern: np.ndarray, tokens: list[str], name: str) -> go.Heatmap:
    boxes = []
    for i in range(len(tokens) - len(pattern), len(tokens)):  # the queries are the last tokens
        boxes.append([f"{name}<br>from {tokens[i]} ({i})<br>to {key} ({j})" for j, key in enumerate(tokens)])
    # The words of a box are the same on all places of a slider, which then keep the numbers alone.
    box = "%{text}<br><b>%{z:.4~g}</b><extra></extra>"
    return go.Heatmap(z=pattern.astype(np.float32), coloraxis="coloraxis", text=boxes, hovertemplate=box)


def _axes(figure: go.Figure, tokens: list[str], queries: int, place: dict, has_below: bool) -> None:
    """Tokens are written once: next to the first column and below the lowest map of each column."""
    look = {"showgrid": False, "zeroline": False, "tickfont": {"size": 11 if len(tokens) <= 16 else 9}}
    figure.update_xaxes(**ticks(tokens, 48), **look, **place, tickangle=-90, showticklabels=not has_below)
    rows = {"range": [queries - 0.5, -0.5], "showticklabels": place["col"] == 1}
    figure.update_yaxes(**ticks(tokens[len(tokens) - queries :], 48), **look, **rows, **place)
