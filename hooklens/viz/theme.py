"""The style of all figures: colours that colour-blind readers can distinguish, and one template."""

import functools
import math

import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK = "#24292f"
GRID = "rgba(128, 136, 148, 0.22)"  # visible on white and on black
POSITIVE, NEGATIVE, NEUTRAL = "#2166ac", "#d9701e", "#6e7781"

# Okabe and Ito (2008), without the yellow that vanishes on white
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6e7781")

# orange: negative, blue: positive; lightness decreases evenly to both sides
DIVERGING = ("#8c3a04", "#d9701e", "#f5b583", "#fbe3d0", "#f7f7f7", "#d6e4f0", "#94bcdc", "#3f86c0", "#0b3f78")
# of a number that goes around, such as an angle: both ends are one colour
CYCLIC = ("#0b3f78", "#3f86c0", "#8fb8b0", "#e0b84c", "#d9701e", "#8c3a04", "#5b3a5e", "#0b3f78")
SEQUENTIAL = ("#f7f9fc", "#d6e4f0", "#a6c8e4", "#6aa3d2", "#3179b5", "#12549a", "#082f63")


_MIDDLE = (1.05 * 0.05) ** 0.5 - 0.05  # luminance with equal contrast, (a + 0.05) / (b + 0.05), to black and to white


@functools.cache
def template() -> go.layout.Template:
    """Margins, fonts and grid of every figure.

    >>> template().layout.paper_bgcolor
    'rgba(0,0,0,0)'
    """
    axis = {
        "gridcolor": GRID,
        "zerolinecolor": "rgba(128, 136, 148, 0.55)",
        "zerolinewidth": 1,
        "linecolor": GRID,
        "ticks": "outside",  # invisible: they keep the labels away from the drawing
        "ticklen": 5,
        "tickcolor": "rgba(0,0,0,0)",
        "automargin": True,  # long labels widen the margin instead of being cut
        "autotickangles": [0, -45, -90],
        "title": {"standoff": 10, "font": {"size": 12.5}},
        "tickfont": {"size": 11},
    }
    layout = {
        "font": {"family": FONT, "size": 13, "color": INK},
        "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 15}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 56, "r": 16, "t": 48, "b": 48},
        "colorway": list(SERIES),
        "hoverlabel": {"font": {"family": FONT, "size": 12}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom"},
        "xaxis": axis,
        "yaxis": axis,
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "rgba(128,136,148,0.6)", "activecolor": NEUTRAL},
    }
    return go.layout.Template(layout=layout)


def plotly_scale(colours: tuple[str, ...]) -> list[list]:
    """Evenly spaced colours in Plotly's format.

    >>> plotly_scale(("#000000", "#ffffff"))
    [[0.0, '#000000'], [1.0, '#ffffff']]
    """
    return [[index / (len(colours) - 1), colour] for index, colour in enumerate(colours)]


def colour_at(colours: tuple[str, ...], fraction: float) -> str:
    """The colour at a fraction of a scale.

    >>> colour_at(("#000000", "#ffffff"), 0.5), colour_at(DIVERGING, 0.5)
    ('#808080', '#f7f7f7')
    """
    at = min(max(fraction, 0.0), 1.0) * (len(colours) - 1)
    low = min(int(at), len(colours) - 2)
    pairs = zip(_rgb(colours[low]), _rgb(colours[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in pairs)


def text_on(background: str) -> str:
    """Dark or light text, whichever is readable on this background (WCAG 2.1 contrast of at least 4.5).

    >>> text_on("#f7f7f7"), text_on("#0b3f78")
    ('#000000', '#ffffff')
    """
    return "#000000" if luminance(background) > _MIDDLE else "#ffffff"


def limits(low: float, high: float, *, diverging: bool, middle: float = 0.0) -> tuple[float, float]:
    """The values at the ends of a colour scale; around `middle`, equally far on both sides.

    >>> limits(-1.0, 3.0, diverging=True), limits(-1.0, 3.0, diverging=False), limits(2.0, 2.0, diverging=False)
    ((-3.0, 3.0), (-1.0, 3.0), (2.0, 3.0))
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        low = high = middle
    if diverging:
        reach = max(abs(low - middle), abs(high - middle)) or 1.0
        return middle - reach, middle + reach
    return low, high if high > low else low + 1.0


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def luminance(colour: str) -> float:
    """WCAG 2.1's relative luminance, from 0 (black) to 1 (white)."""
    parts = (part / 255 for part in _rgb(colour))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
