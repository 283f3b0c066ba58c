"""A diagram of a model's stages: one box per hook point, from tokens to logits, drawn as SVG."""

import html
from collections.abc import Mapping, Sequence

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


_INKS = ("#1f6fb4", "#1f6fb4", "#c2571a", "#c2571a")  # measured curves are solid, computed curves dashed


def draw_curves(x: Sequence[int | float], curves: Mapping[str, Sequence[float]], x_title: str, y_title: str) -> str:
    """An SVG element with curves over a common x, every second one dashed; each is named at its end.

    >>> picture = draw_curves([1, 2], {"seen": [1.0, 3.0], "by formula": [1.0, 2.0]}, "n", "ms")
    >>> picture.count("<polyline"), "by formula" in picture
    (2, True)
    """
    high = max(max(values) for values in curves.values()) or 1.0
    span = (max(x) - min(x)) or 1
    right, bottom = _WIDTH - 180, 240

    def at(value: int | float, y: int | float) -> tuple[float, float]:
        return _LEFT + (value - min(x)) / span * (right - _LEFT), bottom - y / high * (bottom - 24)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} 280" width="{_WIDTH}" height="280" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{html.escape(y_title)}">',
        f'<path d="M {_LEFT} 16 V {bottom} H {right}" fill="none" stroke="#999"/>',
        f'<text x="{_LEFT}" y="12">{html.escape(y_title)}</text>',
        f'<text x="{right + 8}" y="{bottom + 16}">{html.escape(x_title)}</text>',
        f'<text x="{_LEFT - 6}" y="{at(min(x), high)[1] + 4:.0f}" text-anchor="end">{high:.3g}</text>',
    ]
    parts += [
        f'<text x="{at(value, 0)[0]:.0f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>' for value in x[-4:]
    ]
    names = list(curves)
    order = sorted(names, key=lambda name: -curves[name][-1])
    for i, (name, values) in enumerate(curves.items()):
        points = " ".join("{:.1f},{:.1f}".format(*at(a, b)) for a, b in zip(x, values, strict=True))
        dash = ' stroke-dasharray="5 4"' if i % 2 else ""
        ink = _INKS[i % len(_INKS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{ink}" stroke-width="2"{dash}/>')
        top = 30 + 18 * order.index(name)
        parts.append(f'<line x1="{right + 10}" x2="{right + 34}" y1="{top - 4}" y2="{top - 4}" stroke="{ink}"{dash}/>')
        parts.append(f'<text x="{right + 40}" y="{top}">{html.escape(name)}</text>')
    return "".join(parts) + "</svg>"
