"""A text with tokens coloured by a number."""

import html
import math
from collections.abc import Sequence

from jaxtyping import Num
from torch import Tensor

from hooklens.results.table import format_number
from hooklens.viz.inputs import as_array, as_labels
from hooklens.viz.text import Html, escape, shown_token, token_markup
from hooklens.viz.theme import DIVERGING, FONT, SEQUENTIAL, colour_at, limits, text_on

_TOKEN = "padding:.2em .12em;border-radius:3px;margin:0 .5px;white-space:pre-wrap;overflow-wrap:anywhere"


def token_strip(
    str_tokens: Sequence[str],
    values: Num[Tensor, " pos"],
    *,
    title: str = "",
    diverging: bool = True,
    zmid: float = 0.0,
    hover: Sequence[object] | None = None,
) -> Html:
    """Which tokens have large values? The text itself, with each token coloured and its number in the tool tip.

    >>> import torch
    >>> strip = token_strip(["<b>", " a"], torch.tensor([1.0, -1.0]), title="effect")
    >>> "<b>" in strip, "&lt;b&gt;" in strip, 'title="1  ·a: -1.000"' in strip
    (False, True, True)

    White space is written as · (space), ↵ (new line) and ⇥ (tab); a value that is NaN leaves its token uncoloured.
    """
    array = as_array(values, "pos", "token_strip")
    texts = [shown_token(token) for token in str_tokens]
    as_labels(texts, len(array), "pos", "token_strip")
    extra = [""] * len(array) if hover is None else as_labels(hover, len(array), "pos", "token_strip")
    known = [float(value) for value in array if math.isfinite(value)] or [zmid]
    low, high = limits(min(known), max(known), diverging=diverging, middle=zmid)
    colours = DIVERGING if diverging else SEQUENTIAL
    spans = []
    for index, (token, value, more) in enumerate(zip(str_tokens, map(float, array), extra, strict=True)):
        tip = f"{index}  {texts[index]}: {format_number(value)}" + (f"\n{html.unescape(more)}" if more else "")
        look = _look(colour_at(colours, (value - low) / (high - low))) if math.isfinite(value) else "outline:1px dashed"
        after = "<br>" if "\n" in token else "<wbr>"
        spans.append(f'<span style="{_TOKEN};{look}" title="{html.escape(tip)}">{token_markup(token)}</span>{after}')
    key = _key(title, low, high, colours)
    return Html(f'<div style="font:15px/2 {html.escape(FONT)}">{key}<div>{"".join(spans)}</div></div>')


def _look(background: str) -> str:
    return f"background:{background};color:{text_on(background)}"


def _key(title: str, low: float, high: float, colours: tuple[str, ...]) -> str:
    """The colour scale with its ends, above the text."""
    fill = f"linear-gradient(90deg,{','.join(colours)})"
    bar = f"display:inline-block;width:7em;height:.7em;border-radius:3px;background:{fill}"
    ends = f'{format_number(low)} <span style="{bar}"></span> {format_number(high)}'
    ends = f'<span style="white-space:nowrap">{ends}</span>'
    return f'<div style="font-size:12px;opacity:.75">{escape(title)} &ensp;{ends}</div>'
