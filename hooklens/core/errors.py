"""Errors a user can act on: what was asked, what was seen, what would work."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import Formatter
from typing import Any

from hooklens.core.terminal import printable


class HooklensError(Exception):
    """Base of every error that hooklens raises on purpose; catch it to catch them all.

    A message quotes names from files and users, and ends up in a terminal: what does not print is written out.

    >>> print(HooklensError("no tensor named \x1b[31mred"))
    no tensor named \\x1b[31mred
    """

    def __init__(self, *args: object):
        super().__init__(*(printable(one) if isinstance(one, str) else one for one in args))


class InputError(HooklensError, ValueError):
    """A value that cannot be used: the message says which would be."""


class Absent(InputError, AttributeError):
    """An attribute that objects of this kind can have and this one has not: `hasattr` is False, `getattr` defaults."""


class OutOfRange(InputError, IndexError):
    """An index past the end of an axis."""


class KeepsPropertyErrors:
    """Put before nn.Module: what a property says of an attribute that is absent reaches the caller.

    Where a property raises AttributeError Python asks `__getattr__`, and nn.Module's raises another, without the words.
    """

    def __getattr__(self, name: str) -> Any:
        asked = getattr(type(self), name, None)
        return asked.__get__(self) if isinstance(asked, property) else super().__getattr__(name)  # type: ignore[misc]


class ArgumentError(InputError):
    """An argument that cannot be used; the message has its name in braces, so that a command can put its option there.

    >>> error = ArgumentError("{edges} is from 1 to {0}, got {1}", 9, 0)
    >>> print(error, "|", error.told({"edges": "--edges"}))
    edges is from 1 to 9, got 0 | --edges is from 1 to 9, got 0

    Values are numbered and come after the message, so that braces in them stay as they are.
    """

    def __init__(self, message: str, *values: Any):
        super().__init__(message, *values)

    def told(self, names: Mapping[str, str]) -> str:
        """The message with other names for these arguments."""
        message, *values = self.args
        return printable(Formatter().vformat(message, values, _Names(names)))

    def __str__(self) -> str:
        return self.told({})


class Refused(InputError):
    """Arguments that cannot be used: each one's name with what is wrong with it. `judge` raises it."""

    def __init__(self, errors: Sequence[tuple[str, HooklensError]]):
        self.errors = errors
        super().__init__(self.told({}))

    def told(self, names: Mapping[str, str]) -> str:
        """All messages. One that does not name its argument begins with that name, or the one in `names`."""
        lines = []
        for name, error in self.errors:
            if isinstance(error, ArgumentError | Refused):
                lines.append(error.told(names))
                continue
            shown = names.get(name, name)
            lines.append(str(error) if shown in str(error) else f"{shown}: {error}")
        return lines[0] if len(lines) == 1 else "\n- ".join([f"{len(lines)} things are wrong:", *lines])


def judge(checks: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What these checks return, by the argument that each is about; all errors are raised together.

    >>> judge({"edges": lambda: int("3")})
    {'edges': 3}
    """
    found: dict[str, Any] = {}
    errors: list[tuple[str, HooklensError]] = []
    for name, check in checks.items():
        try:
            found[name] = check()
        except HooklensError as error:
            errors.append((name, error))
    if errors:
        raise Refused(errors) from errors[0][1]
    return found


class _Names(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return name


class NameNotFound(HooklensError, KeyError):
    """A name that does not exist; the message lists the closest ones."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr, quotes and all


class WrongType(HooklensError, TypeError):
    """An object of a kind that cannot be used here."""


class HookError(HooklensError, ValueError):
    """A hook that broke its contract: wrong shape, wrong dtype, or an in-place edit that it did not return."""


class FileRefused(HooklensError, ValueError):
    """A damaged, truncated or foreign file, refused before any tensor of it is used."""


class CheckFailed(HooklensError, RuntimeError):
    """Numbers that do not agree with their own check: they are not given out."""


class Unavailable(HooklensError, RuntimeError):
    """Something outside the program is missing: the network, an extra package, disk space."""


def did_you_mean(what: str, name: str, known: Iterable[str], *, many: int = 3) -> NameNotFound:
    """The error for an unknown name, with its nearest neighbours.

    >>> print(did_you_mean("site", "resid_pos", ["resid_post", "resid_pre", "z"]))
    no site named 'resid_pos'; closest: resid_post, resid_pre
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=many, cutoff=0.5)
    if close:
        return NameNotFound(f"no {what} named {name!r}; closest: {', '.join(close)}")
    shown = ", ".join(known[:12]) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
    return NameNotFound(f"no {what} named {name!r}; there are: {shown or 'none'}")
