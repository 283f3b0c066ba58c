"""The output of commands: tables with their captions, or JSON."""

import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hooklens.core.terminal import json_line, printable

if TYPE_CHECKING:
    from hooklens.results.table import Table


_PIPED = 80  # columns of sentences where there is no terminal

Tables = Mapping[str, tuple[str, "Table"]]


def show(
    table: "Table",
    as_json: bool,
    *,
    caption: str = "",
    terms: Mapping[str, str] | None = None,
    before: Tables | None = None,
    more: Mapping[str, Any] | None = None,
    sentences: bool = False,
) -> None:
    """Print a table below its caption, with additional lines; or everything as one JSON object.

    `terms` say what columns are; `before` are tables that come first, each with its own line. Into a file or a pipe a
    row is a line, which a program can read; with `sentences` it is wrapped there too.
    """
    from hooklens.results.result import plain

    more, before = more or {}, before or {}
    if as_json:
        tables = {"rows": table} | {name: other for name, (_, other) in before.items()}
        values = {name: str(value) if isinstance(value, Path) else value for name, value in more.items()}
        typer.echo(json_line(plain({name: _objects(rows) for name, rows in tables.items()} | values)))
        return
    for line, rows in (*before.values(), (caption, table)):
        _print(line, rows, sentences)
    known = {name: meaning for name, meaning in (terms or {}).items() if name in table.columns}
    for name, value in (known | _short(more)).items():
        typer.echo(_wrapped(f"{name}: {printable(value)}") if isinstance(value, str) else f"{name}: {printable(value)}")


def _wrapped(line: str) -> str:
    """A sentence at the width of the terminal, between words; as it is where there is none."""
    if sys.stdout is None or not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _objects(table: "Table") -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def _print(caption: str, table: "Table", wrap: bool) -> None:
    if caption:
        typer.echo(printable(caption))
    terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it was closed before the start
    if terminal or wrap:
        from rich.console import Console

        Console(width=None if terminal else _PIPED).print(table)
    else:
        typer.echo(printable(table))


def _short(more: Mapping[str, Any]) -> dict[str, Any]:
    """Files beside the first are shown by name only."""
    paths = [value for value in more.values() if isinstance(value, Path)]
    beside = [path for path in paths[1:] if path.parent == paths[0].parent]
    return {
        name: f"{value.name}, beside it" if any(value is path for path in beside) else value
        for name, value in more.items()
    }
