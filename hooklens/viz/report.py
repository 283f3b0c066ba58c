"""A report: one HTML file that opens without a network, and its numbers as JSON next to it."""

import html
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from hooklens import __version__
from hooklens.core.arguments import path_of
from hooklens.core.errors import InputError
from hooklens.core.files import write_atomically
from hooklens.results.result import plain
from hooklens.results.table import Table, format_number
from hooklens.viz.html_page import page
from hooklens.viz.text import Html, escape, shown_token, token_markup

_CLAIMS = (
    "Claim: the statement; each is explained below. Status: exploratory, not written down before the run; self-dated, "
    "written to a file at the time shown, according to its author's clock only; registered, self-dated and with a "
    "digest equal to the published one. Verdict: causal, the effect of the intervention exceeds 0 (or the registered "
    "threshold) and the effect of its control, by 95 % intervals over groups of prompts, with p and q of at most 0.05; "
    "opposite effect, a significant effect in the direction opposite to the claim. Effect: mean over prompts, with the "
    "low and high end of its interval. Control: the mean effect of an intervention that should do nothing. q: the "
    "false discovery rate if this claim and all with a smaller p were called causal (Benjamini-Hochberg, this table)."
)
_READ_AT_ONCE = 6  # number of claims whose sentences are shown unfolded below the table
_ROWS = 20  # number of claims whose rows are shown unfolded


class Report:
    """Collect text, numbers, tables and figures in order, then save them as one page.

    >>> import tempfile
    >>> report = Report("Indirect objects").text("One pair.").numbers({"clean": 3.2})
    >>> path = report.save(Path(tempfile.mkdtemp()) / "ioi.html")
    >>> path.name, path.with_suffix(".json").read_text()[:27]
    ('ioi.html', '{"title": "Indirect objects')

    Every method returns the report. All text is shown literally: it is never interpreted as markup.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[Html] = []
        self._figures: list[str] = []
        self._numbers: dict[str, Any] = {}
        self._tables: list[dict[str, Any]] = []

    def heading(self, text: str) -> "Report":
        """Add a heading."""
        return self._add(f"<h2>{escape(text)}</h2>")

    def text(self, paragraph: str) -> "Report":
        """Add a paragraph of plain text."""
        return self._add(f"<p>{escape(paragraph)}</p>")

    def code(self, lines: str) -> "Report":
        """Add lines of code, each as it is.

        >>> "<pre>a &lt; b</pre>" in Report("x").code("a < b").to_html()
        True
        """
        return self._add(f"<pre>{escape(lines)}</pre>")

    def numbers(self, numbers: Mapping[str, Any]) -> "Report":
        """Add a few named numbers (or words) in large type."""
        self._numbers |= {str(name): plain(value) for name, value in numbers.items()}
        cells = (
            f"<div><dt>{escape(name)}</dt><dd>{escape(_shown(value))}</dd></div>" for name, value in numbers.items()
        )
        return self._card(f'<dl class="numbers">{"".join(cells)}</dl>')

    @contextmanager
    def fold(self, summary: str) -> Iterator["Report"]:
        """Everything added inside the block is folded behind one line.

        >>> with Report("x").fold("the other prompts") as report:
        ...     _ = report.text("one more")
        >>> "<details><summary>the other prompts</summary>\\n<p>one more</p>\\n</details>" in report.to_html()
        True
        """
        self._add(f"<details><summary>{escape(summary)}</summary>")
        try:
            yield self
        finally:
            self._add("</details>")

    def table(self, table: Table, caption: str = "", terms: Mapping[str, str] | None = None) -> "Report":
        """Add a table; its values also go into the JSON. `terms` explain columns; other columns have no note."""
        known = {name: terms[name] for name in table.columns if terms and name in terms}
        words = " ".join([caption, *(f"{name}: {meaning}." for name, meaning in known.items())]).strip()
        self._tables.append({"caption": words, "columns": list(table.columns), "rows": _plain_rows(table)})
        shown = "".join(f" <b>{escape(name)}</b>: {escape(meaning)}." for name, meaning in known.items())
        return self._card(f'<div class="wide">{table.to_html()}</div>', Html(escape(caption) + shown))

    def figure(self, figure: go.Figure, caption: str = "") -> "Report":
        """Add a Plotly figure. Its title becomes a heading of the page, which wraps instead of being cut."""
        figure = go.Figure(figure)
        title, margin = figure.layout.title.text, figure.layout.margin.t
        if title:
            figure.update_layout(title_text=None, margin_t=None if margin is None else max(36, margin - 40))
        heading = f"<h3>{escape(_words(title))}</h3>" if title else ""
        height = f"{int(figure.layout.height or 450)}px"
        said = f'role="figure" aria-label="{escape(_words(title) if title else caption or "figure")}"'
        place = f'<div class="plot" id="figure-{len(self._figures)}" {said} style="height:{height}"></div>'
        self._figures.append(figure.to_json())
        return self._card(f'{heading}<div class="wide">{place}</div>', caption)

    def claims(self, family: Any, caption: str = "") -> "Report":
        """Add a `ClaimFamily` with its evidence. Claims that were not registered before the run are marked as such."""
        n, caption = len(family.claims), caption or _CLAIMS
        if n > _ROWS:
            self.table(family.top(_ROWS), f"The {_ROWS} of {n} claims with the smallest q. {caption}")
            with self.fold(f"All {n} claims"):
                self.table(family.table(), "Columns as above.")
        else:
            self.table(family.table(), caption)
        words = f"The {n} claims in words, each with its observation, intervention and control"
        with self.fold(words) if n > _READ_AT_ONCE else nullcontext():
            for claim in family.claims:
                self.text(claim.sentence())
        return self

    def tokens(self, strip: Html, caption: str = "") -> "Report":
        """Add a text coloured by one number per token: the result of `token_strip`."""
        return self._card(escape(strip), caption)

    def prompts(
        self,
        clean: Sequence[str],
        corrupted: Sequence[str],
        *,
        clean_top: Sequence[tuple[str, float]] = (),
        corrupted_top: Sequence[tuple[str, float]] = (),
        caption: str = "",
    ) -> "Report":
        """Add two prompts token by token, with their differences and the model's predictions after each.

        The predictions are (token, probability), most probable first.
        """
        differs = SequenceMatcher(None, clean, corrupted, autojunk=False).get_opcodes()
        ours = {i for kind, start, stop, _, _ in differs if kind != "equal" for i in range(start, stop)}
        theirs = {i for kind, _, _, start, stop in differs if kind != "equal" for i in range(start, stop)}
        if len(clean) == len(corrupted):  # compared by position, as a patch does
            ours = theirs = {i for i, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b}
        rows = [_prompt("Clean", clean, ours, clean_top), _prompt("Corrupted", corrupted, theirs, corrupted_top)]
        return self._card("".join(rows), caption)

    def to_html(self, *, reload: float | None = None) -> Html:
        """The whole page as HTML; with `reload` it reads itself from disk again every so many seconds."""
        footer = f"Made by hooklens {__version__}. This page is complete: it loads nothing."
        return page(self.title, self._parts, self._figures, footer, reload)

    def save(self, path: str | os.PathLike, *, data: Any = None, reload: float | None = None) -> Path:
        """Write the page to `path`, and the title, numbers, tables and `data` as JSON next to it (same stem).

        `reload` as in `to_html`: for a page that is written again and again.
        """
        path = path_of(path)
        beside = path.with_suffix(".json") if path.name else path
        if path == beside and path.name:
            raise InputError(f"{str(path)!r} is the name of the JSON file next to the page; choose {path.stem}.html")
        content = {"title": self.title, "numbers": self._numbers, "tables": self._tables, "data": plain(data)}
        text = json.dumps(content, allow_nan=False)
        with write_atomically(path) as page_path, write_atomically(beside) as json_path:
            page_path.write_text(self.to_html(reload=reload), encoding="utf-8", newline="\n")
            json_path.write_text(text + "\n", encoding="utf-8")
        return path

    def _add(self, markup: str) -> "Report":
        self._parts.append(Html(markup))
        return self

    def _card(self, markup: str, caption: str = "") -> "Report":
        below = f'<p class="caption">{escape(caption)}</p>' if caption else ""
        return self._add(f"<section>{markup}{below}</section>")


def _shown(value: Any) -> str:
    value = plain(value)
    return format_number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _plain_rows(table: Table) -> list[list[Any]]:
    simple = (int, float, str, bool, type(None))
    return [[plain(cell) if isinstance(cell, simple) else str(cell) for cell in row] for row in table.rows]


def _words(title: str) -> str:
    """A Plotly title without its markup."""
    return html.unescape(re.sub(r"</?[a-z][^<>]*>", " ", title))


def _prompt(name: str, str_tokens: Sequence[str], differs: set[int], top: Sequence[tuple[str, float]]) -> str:
    tokens = "<wbr>".join(
        f'<span class="token{" differs" * (i in differs)}" title="position {i}">{token_markup(token)}</span>'
        + "<br>" * ("\n" in token)
        for i, token in enumerate(str_tokens)
    )
    guesses = "".join(
        f'<b title="{escape(shown_token(token))}">{token_markup(token)}</b>'
        f'<i style="width:{100 * min(max(float(share), 0.0), 1.0):.2f}%"></i><span class="share">{share:.1%}</span>'
        for token, share in top
    )
    below = f'<div class="guesses">{guesses}</div>' if guesses else ""
    title = f"<h3>{name}, {len(str_tokens)} tokens</h3>"
    return f'<div class="prompt">{title}<div class="tokens">{tokens}</div>{below}</div>'
