"""A progress bar with rate and time left, silent where nobody is looking."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Advance(Protocol):
    """Call it with the amount of work just done."""

    def __call__(self, amount: int | float = 1) -> None: ...


@contextmanager
def progress(title: str, total: int | float, *, unit: str = "it", show: bool | None = None) -> Iterator[Advance]:
    """A bar on standard error for `total` units of work; `show=None` means: only on a terminal.

    >>> with progress("counting", 3) as advance:
    ...     for _ in range(3):
    ...         advance()
    """
    if not ((sys.stderr is not None and sys.stderr.isatty()) if show is None else show):
        yield lambda amount=1: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class Rate(TextColumn):
        def render(self, task):
            speed = task.finished_speed or task.speed
            self.text_format = "" if speed is None else f"{speed:,.0f} {unit}/s"
            return super().render(task)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(""), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount=1: bar.advance(task, amount)
