"""A small table: columns and rows, as aligned text, Markdown, HTML or a rich table."""

import html
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from hooklens.core.arguments import whole
from hooklens.core.errors import InputError
from hooklens.core.terminal import visible

_UNWRAPPED = 20  # minimum width to which text is wrapped on a terminal


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of values under named columns; `print` it, or convert it to another format.

    >>> table = Table(["head", "effect", "token"], [("L9H6", 0.51234, " Mary"), ("L10H0", -0.0871, "\\n")])
    >>> print(table)
    head    effect  token
    L9H6    0.5123   Mary
    L10H0  -0.0871  \\n
    >>> print(table.to_markdown())
    | head | effect | token |
    |:---|---:|:---|
    | L9H6 | 0.5123 |  Mary |
    | L10H0 | -0.0871 | \\\\n |
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(str(column) for column in self.columns))
        object.__setattr__(self, "rows", tuple(tuple(_scalar(cell) for cell in row) for row in self.rows))
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise InputError(
                    f"a table with {len(self.columns)} columns ({', '.join(self.columns)}) needs as many cells in "
                    f"each row, got {len(row)} in row {index}; give None for an empty cell"
                )

    def __len__(self) -> int:
        return len(self.rows)

    def head(self, n: int | None) -> "Table":
        """The first `n` rows (None: all).

        >>> len(Table(["n"], [(1,), (2,), (3,)]).head(2))
        2
        """
        return self if n is None else Table(self.columns, self.rows[: whole("n", n)])

    def texts(self) -> list[list[str]]:
        """The text of every cell: numbers of a column share their decimals, control characters are visible.

        >>> Table(["p"], [(0.5,), (3e-9,), (None,), (float("nan"),)]).texts()
        [['0.5000'], ['3.0e-09'], [''], ['nan']]
        """
        by_column = [_column_texts([row[i] for row in self.rows]) for i in range(len(self.columns))]
        return [list(cells) for cells in zip(*by_column, strict=True)] if self.columns else []

    def is_numeric(self) -> list[bool]:
        """Which columns contain only numbers (and are right-aligned).

        >>> Table(["head", "effect"], [("L0H1", 2.0), ("L0H2", None)]).is_numeric()
        [False, True]
        """
        columns = ([row[i] for row in self.rows if row[i] is not None] for i in range(len(self.columns)))
        return [bool(cells) and all(_is_number(cell) for cell in cells) for cells in columns]

    def __str__(self) -> str:
        lines = [[visible(column) for column in self.columns], *self.texts()]
        numeric = self.is_numeric()
        widths = [max(_width(line[i]) for line in lines) for i in range(len(self.columns))]
        return "\n".join(_aligned(line, widths, numeric) for line in lines)

    def to_markdown(self) -> str:
        """The table as GitHub Markdown, with all special characters escaped.

        >>> print(Table(["token"], [("a|b <i>",)]).to_markdown())
        | token |
        |:---|
        | a\\|b &lt;i&gt; |
        """
        rules = {True: "---:", False: ":---"}
        rule = "|".join(rules[number] for number in self.is_numeric())
        header = " | ".join(_markdown(visible(column)) for column in self.columns)
        body = [" | ".join(map(_markdown, row)) for row in self.texts()]
        return "\n".join([f"| {header} |", f"|{rule}|", *(f"| {row} |" for row in body)])

    def to_html(self) -> str:
        """The table as an HTML element, escaped; number cells have the class "number".

        >>> print(Table(["token"], [("<b>",)]).to_html())
        <table><thead><tr><th>token</th></tr></thead><tbody><tr><td>&lt;b&gt;</td></tr></tbody></table>
        """
        kinds = [' class="number"' if number else "" for number in self.is_numeric()]
        head = _html_row("th", [visible(column) for column in self.columns], kinds)
        body = "".join(_html_row("td", row, kinds) for row in self.texts())
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"

    _repr_html_ = to_html

    def joined(self) -> list[tuple[str, list[str], bool]]:
        """Name, texts and "is numeric" of each column, with a value and its interval combined.

        >>> Table(["head", "effect", "95% low", "95% high"], [("L0H1", 0.4123, 0.3611, 0.4508)]).joined()[1]
        ('effect [95%]', ['0.412 [0.361, 0.451]'], True)
        """
        numeric, texts = self.is_numeric(), self.texts()
        columns: list[tuple[str, list[str], bool]] = []
        i = 0
        while i < len(self.columns):
            name, ends = self.columns[i], [column.rpartition(" ")[2] for column in self.columns[i + 1 : i + 3]]
            if numeric[i] and ends == ["low", "high"]:
                inside = "95%" if "95%" in self.columns[i + 1] else "low, high"
                columns.append((f"{visible(name)} [{inside}]", _intervals([row[i : i + 3] for row in self.rows]), True))
                i += 3
            else:
                columns.append((visible(name), [row[i] for row in texts], numeric[i]))
                i += 1
        return columns

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Render with rich: numbers are never cut; number columns that do not fit are named below; text is wrapped."""
        from rich.text import Text  # as Text: a token such as "[bold]" must not be read as markup

        columns = self.joined()
        left_out: list[str] = []
        while (widths := _widths(columns, options.max_width)) is None:
            last = max(i for i, (_, _, number) in enumerate(columns) if number)
            left_out.insert(0, columns.pop(last)[0])
        yield _rich(columns, widths)
        if left_out:
            yield Text(f"No room in {options.max_width} columns for: {'; '.join(left_out)}.\n")


def _intervals(cells: Sequence[Sequence[Any]]) -> list[str]:
    """Value and both ends with three significant digits of the largest."""
    flat = [x for row in cells for x in row if _is_number(x) and math.isfinite(x) and x]
    decimals = max(0, min(_decimals(max(map(abs, flat))), 4) - 1) if flat else 1
    rows = ([_cell_text(None if cell != cell else cell, decimals) for cell in row] for row in cells)
    return [f"{value} [{low}, {high}]" if low and high else value for value, low, high in rows]


def _widths(columns: Sequence[tuple[str, list[str], bool]], room: int) -> list[int | None] | None:
    """A width for each column such that no number is cut; None if there are too many number columns."""
    least, most = [], []
    for name, texts, number in columns:
        widest, word = (max(map(_width, some), default=0) for some in (texts, name.split()))
        least.append(max(word, widest if number else min(widest, _UNWRAPPED)))
        most.append(max(widest, _width(name)))
    free = room - sum(least) - (3 * len(columns) - 1)  # rich's separators between and around columns
    if free < 0 and sum(number for _, _, number in columns) > 1:
        return None
    if free < 0:  # text gets the remaining width, however narrow
        return [low if number else None for low, (_, _, number) in zip(least, columns, strict=True)]
    widths: list[int | None] = []
    for low, high in zip(least, most, strict=True):
        more = min(free, high - low)
        widths.append(low + more)
        free -= more
    return widths


def _rich(columns: Sequence[tuple[str, list[str], bool]], widths: Sequence[int | None]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for (name, _, number), width in zip(columns, widths, strict=True):
        table.add_column(Text(name), justify="right" if number else "left", width=width, overflow="fold")
    for row in zip(*(texts for _, texts, _ in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


def format_number(value: int | float, decimals: int | None = None) -> str:
    """Format a number with about four significant digits.

    >>> [format_number(x) for x in (3.2, 12, 1234.567, 0.00012, -1e-9, -0.0, float("inf"))]
    ['3.200', '12', '1235', '0.0001200', '-1.00e-09', '0', 'inf']
    """
    if isinstance(value, Integral):
        return str(int(value))
    if not math.isfinite(value) or value == 0:
        return f"{0.0:.{decimals or 0}f}" if value == 0 else str(float(value))
    if decimals is None:
        if abs(value) < 1e-4:
            return f"{value:.2e}"
        decimals = _decimals(value)
    if abs(value) >= 1e7 or abs(value) < 0.5 * 10.0**-decimals:
        return f"{value:.1e}" if abs(value) < 1 else f"{value:.3e}"
    text = f"{value:.{decimals}f}"
    return text if text.strip("-0.") else text.removeprefix("-")


def _decimals(value: float) -> int:
    return max(0, 3 - math.floor(math.log10(abs(value))))


def _column_texts(cells: list[Any]) -> list[str]:
    """Decimals follow the column's largest number, to align points; a number that would vanish gets an exponent."""
    floats = [abs(c) for c in cells if _is_number(c) and not isinstance(c, Integral) and math.isfinite(c) and c != 0]
    decimals = min(_decimals(max(floats)), 4) if floats else 1
    if floats and max(floats) < 0.001:
        decimals = min(_decimals(max(floats)), 7)
    return [_cell_text(cell, decimals) for cell in cells]


def _cell_text(cell: Any, decimals: int) -> str:
    if cell is None:
        return ""
    return format_number(cell, decimals) if _is_number(cell) else visible(str(cell))


def _is_number(cell: Any) -> bool:
    return isinstance(cell, Real) and not isinstance(cell, bool)


def _scalar(cell: Any) -> Any:
    """Convert a 0-d tensor or NumPy number to a Python number."""
    return cell.item() if hasattr(cell, "item") and getattr(cell, "ndim", 0) == 0 else cell


def _width(text: str) -> int:
    """The width of a text in terminal columns: wide (East Asian) characters count two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text if not unicodedata.combining(c))
    return wide + sum(not unicodedata.combining(c) for c in text)


def _aligned(line: list[str], widths: list[int], numeric: list[bool]) -> str:
    gaps = [" " * (width - _width(text)) for text, width in zip(line, widths, strict=True)]
    cells = zip(line, gaps, numeric, strict=True)
    padded = [gap + text if number else text + gap for text, gap, number in cells]
    return "  ".join(padded).rstrip()


def _markdown(text: str) -> str:
    return re.sub(r"[\\|`*_\[\]~$]", r"\\\g<0>", html.escape(text, quote=False))


def _html_row(tag: str, cells: Sequence[str], kinds: Sequence[str]) -> str:
    parts = (f"<{tag}{kind}>{html.escape(text)}</{tag}>" for text, kind in zip(cells, kinds, strict=True))
    return f"<tr>{''.join(parts)}</tr>"
