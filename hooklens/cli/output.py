"""The output of commands: tables or JSON, the report's path, and the estimated duration."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hooklens.cli.base import say
from hooklens.core.terminal import json_line, printable

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer
    from hooklens.results.table import Table


def written(out: Path) -> dict[str, Any]:
    """The absolute paths of the report and its numbers."""
    return {"report": out.absolute(), "numbers": out.with_suffix(".json").absolute()}


def say_how_long(model: "HookedTransformer", tokens: int | float) -> None:
    """Print the estimated duration before a command that takes more than a minute."""
    from hooklens.cli.estimates import how_long

    say(*how_long(model, tokens))


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
    more = more or {}
    if as_json:
        others = {name: _objects(other) for name, (_, other) in (before or {}).items()}
        told = {name: str(value) if isinstance(value, Path) else value for name, value in more.items()}
        typer.echo(json_line(_plain({"rows": _objects(table), **others, **told})))
        return
    for line, one in (*(before or {}).values(), (caption, table)):
        _print(line, one, sentences)
    known = {name: meaning for name, meaning in (terms or {}).items() if name in table.columns}
    typer.echo("".join(f"{name}: {printable(value)}\n" for name, value in (known | _short(more)).items()), nl=False)


def _plain(value: Any) -> Any:
    from hooklens.results.result import plain

    return plain(value)


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
    """Files after the first are shown by name only."""
    paths = [value for value in more.values() if isinstance(value, Path)]
    beside = [path for path in paths[1:] if path.parent == paths[0].parent]
    return {
        name: f"{value.name}, beside it" if any(value is path for path in beside) else value
        for name, value in more.items()
    }
