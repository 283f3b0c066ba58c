"""Progress bars with rate and remaining time, shown on a terminal and in a notebook only.

`HOOKLENS_PROGRESS=0` in the environment disables all bars and `1` enables them; `hl.engine(progress=False)` does so for
a `with` block.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from io import StringIO
from typing import Any, Protocol, TypeVar, runtime_checkable

from hooklens.core.terminal import visible

Item = TypeVar("Item")
ENV = "HOOKLENS_PROGRESS"
_display: ContextVar[Any] = ContextVar("hooklens_progress_display", default=None)
_REDRAW = 0.1  # seconds between two redraws in a notebook


@runtime_checkable
class Advance(Protocol):
    """Call it with the amount of work just done, and a short text that the bar shows from then on."""

    def __call__(self, amount: int | float = 1, note: str | None = None) -> None: ...


_step: ContextVar[Callable[[int | float], None] | None] = ContextVar("hooklens_progress_step", default=None)


@contextmanager
def progress(title: str, total: int | float, *, unit: str = "it", show: bool | None = None) -> Iterator[Advance]:
    """A bar on standard error (or below a notebook's cell) for `total` units of work; nested bars are stacked.

    >>> with progress("counting", 3) as advance:
    ...     for _ in range(3):
    ...         advance()

    `show=None` follows `hl.engine(progress=...)` or the environment; by default, a terminal or notebook shows bars.
    """
    if not is_shown(show):
        yield lambda amount=1, note=None: None
        return
    from rich.markup import escape

    around = _display.get()
    with _new_display() if around is None else nullcontext(around) as bars:
        task = bars.add_task(escape(visible(title)), total=total, unit=unit, note="")

        def advance(amount: int | float = 1, note: str | None = None) -> None:
            if note is not None:
                bars.update(task, note=escape(visible(note)))
            bars.advance(task, amount)

        try:
            yield advance
        finally:
            bars.remove_task(task)


def tracked(items: Sequence[Item], title: str, unit: str) -> Iterator[Item]:
    """Iterate over the items with a progress bar.

    >>> list(tracked([1, 2], "counting", "numbers"))
    [1, 2]
    """
    with progress(title, len(items), unit=unit) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def within(advance: Advance, amount: int | float, total: int | float) -> Iterator[None]:
    """A block that advances a bar by `amount` in `total` calls of `step`; its end adds the rest.

    >>> with within(print, 6, 4):
    ...     step()
    ...     step(2)
    1.5
    3.0
    1.5
    """
    done, around = 0.0, _step.get()

    def move(n: int | float = 1) -> None:
        nonlocal done
        more = min(amount * n / total, amount - done)
        done += more
        advance(more)

    _step.set(move)
    try:
        yield
    finally:
        _step.set(around)
    if done < amount:
        advance(amount - done)


def step(n: int | float = 1) -> None:
    """Advance the bar of the surrounding `within` block, if there is one."""
    move = _step.get()
    if move is not None:
        move(n)


def is_shown(show: bool | None = None) -> bool:
    """Whether a bar is drawn. The first that is set decides: `show`, `hl.engine`, the environment, the terminal."""
    for said in (show, asked(), {"0": False, "1": True}.get(os.environ.get(ENV, ""))):
        if said is not None:
            return said
    return (sys.stderr is not None and sys.stderr.isatty()) or _in_notebook()


def asked() -> bool | None:
    """The setting of `hl.engine(progress=...)`, None if unset; sweeps.settings puts its own function here."""
    return None


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


@contextmanager
def _new_display() -> Iterator[Any]:
    bars = _under_a_cell() if _in_notebook() else _on_stderr()
    with bars:
        _display.set(bars)
        try:
            yield bars
        finally:
            _display.set(None)


def _on_stderr() -> Any:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*_columns(), console=Console(stderr=True), transient=True)


def _columns() -> tuple:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    class Rate(TextColumn):
        def render(self, task):
            speed = task.finished_speed or task.speed
            self.text_format = "" if speed is None else f"{_speed(speed)} {task.fields['unit']}/s"
            return super().render(task)

    counted = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return *counted, TextColumn("{task.fields[note]}"), Rate(""), TimeRemainingColumn()


def _speed(speed: float) -> str:
    """About three digits.

    >>> _speed(0.5), _speed(17.94), _speed(1234.5)
    ('0.5', '17.9', '1,234')
    """
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def _under_a_cell() -> Any:
    """Bars as text in a cell's output, which every notebook can update; rich's own bars need the package ipywidgets."""
    from IPython.display import display
    from rich.console import Console
    from rich.progress import Progress

    class Bars(Progress):
        def start(self) -> None:
            self.cell = display({"text/plain": ""}, raw=True, display_id=True)
            self.drawn = -_REDRAW

        def stop(self) -> None:
            self.cell.update({"text/plain": ""}, raw=True)

        def advance(self, *step: Any) -> None:
            super().advance(*step)
            self.refresh()

        def refresh(self) -> None:
            if time.monotonic() - self.drawn < _REDRAW:
                return
            self.drawn = time.monotonic()
            console = Console(file=StringIO(), width=100, force_jupyter=False, color_system=None)
            with console.capture() as text:
                console.print(self.get_renderable())
            self.cell.update({"text/plain": text.get().rstrip()}, raw=True)

    return Bars(*_columns(), console=Console(file=StringIO(), force_jupyter=False), auto_refresh=False)


def say_estimate(what: str, seconds: float, *, least: float = 60.0) -> None:
    """Print an estimate of the whole duration on standard error, after timing the first part, if over a minute.

    >>> say_estimate("three layers", 2.0)
    """
    if seconds >= least:
        minutes = seconds / 60
        print(f"{what} take about {minutes:.0f} minute{'s' * (round(minutes) != 1)}", file=sys.stderr, flush=True)
