"""A diagram of a model's stages: one box per hook point, from tokens to logits, drawn as SVG."""

import html
from collections.abc import Sequence

_ROW, _WIDTH, _LEFT = 26, 720, 60
#: Colours by the part of the model; the first matching part of the name decides.
_COLOURS = {
    "attn": "#dbe9f6",
    "mlp": "#fde6cd",
    "ln": "#ececec",
    "resid": "#d9f0d3",
    "unembed": "#eadcf0",
    "": "#f7f7f7",
}


def draw(title: str, stages: Sequence[tuple[str, str, Sequence[int]]], n_layers: int) -> str:
    """An SVG element with one box per stage `(point, axes, shape)`; a frame surrounds those of a block.

    >>> picture = draw("a<b", [("hook_embed", "batch pos d_model", [1, 4, 8])], 2)
    >>> "a&lt;b" in picture, "1 × 4 × 8" in picture
    (True, True)
    """
    inside = [i for i, (point, _, _) in enumerate(stages) if point.startswith("blocks.")]
    height = _top(len(stages)) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{html.escape(title)}">',
        f'<text x="{_LEFT}" y="22" font-size="15" font-weight="bold">{html.escape(title)}</text>',
    ]
    if inside:
        parts.append(_frame(_top(inside[0]) - 3, _top(inside[-1] + 1) - 1, n_layers))
    parts += [_box(_top(i), *stage) for i, stage in enumerate(stages)]
    parts.append(_stream(_top(0), _top(len(stages))))
    return "".join(parts) + "</svg>"


def _top(row: int) -> int:
    return 36 + row * _ROW


def _frame(top: int, bottom: int, n_layers: int) -> str:
    middle = (top + bottom) // 2
    return (
        f'<rect x="{_LEFT - 8}" y="{top}" width="{_WIDTH - _LEFT}" height="{bottom - top}" rx="8" fill="none" '
        f'stroke="#888" stroke-dasharray="5 3"/><text x="16" y="{middle}" fill="#555" '
        f'transform="rotate(-90 16 {middle})" text-anchor="middle">× {n_layers} layers</text>'
    )


def _box(top: int, point: str, axes: str, shape: Sequence[int]) -> str:
    name = point.removeprefix("blocks.N.")
    colour = next(colour for key, colour in _COLOURS.items() if key in name)
    sizes = " × ".join(map(str, shape))
    return (
        f'<rect x="{_LEFT}" y="{top}" width="240" height="{_ROW - 5}" rx="4" fill="{colour}" stroke="#999"/>'
        f'<text x="{_LEFT + 8}" y="{top + 15}">{html.escape(name)}</text>'
        f'<text x="{_LEFT + 252}" y="{top + 15}" fill="#333">{html.escape(axes)}</text>'
        f'<text x="{_WIDTH - 20}" y="{top + 15}" fill="#333" text-anchor="end">{html.escape(sizes)}</text>'
    )


def _stream(top: int, bottom: int) -> str:
    x = _LEFT - 18
    return (
        f'<line x1="{x}" y1="{top}" x2="{x}" y2="{bottom - 8}" stroke="#4a9a3f" stroke-width="3"/>'
        f'<path d="M {x - 5} {bottom - 10} L {x + 5} {bottom - 10} L {x} {bottom} Z" fill="#4a9a3f"/>'
    )
