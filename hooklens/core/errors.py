"""Errors that a user can act on: what was asked, what was seen, what would work."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import Formatter
from typing import Any

from hooklens.core.terminal import printable


class HooklensError(Exception):
    """Base class of every error that hooklens raises deliberately; catch it to catch them all.

    A message quotes names from files and users and is printed on a terminal, so unprintable characters are escaped.

    >>> print(HooklensError("no tensor named \x1b[31mred"))
    no tensor named \\x1b[31mred
    """

    def __init__(self, *args: object):
        shown = [printable(arg) if isinstance(arg, str) else arg for arg in args]
        super().__init__(*shown)


class InputError(HooklensError, ValueError):
    """A value that cannot be used; the message says which values can."""


class Absent(InputError, AttributeError):
    """An attribute that objects of this kind may have, but this one lacks: `hasattr` is False, `getattr` defaults."""


class OutOfRange(InputError, IndexError):
    """An index past the end of an axis."""


class KeepsPropertyErrors:
    """Mixin, placed before nn.Module, that preserves the message of an AttributeError raised by a property.

    If a property raises AttributeError, Python calls `__getattr__`, and nn.Module's raises a different error.
    """

    def __getattr__(self, name: str) -> Any:
        asked = getattr(type(self), name, None)
        return asked.__get__(self) if isinstance(asked, property) else super().__getattr__(name)  # type: ignore[misc]


class ArgumentError(InputError):
    """An argument that cannot be used. The message has its name in braces, so a command can insert its option there.

    >>> error = ArgumentError("{edges} is from 1 to {0}, got {1}", 9, 0)
    >>> print(error, "|", error.told({"edges": "--edges"}))
    edges is from 1 to 9, got 0 | --edges is from 1 to 9, got 0

    Values are numbered and passed after the message, so that braces in them are not interpreted.
    """

    def __init__(self, message: str, *values: Any):
        super().__init__(message, *values)

    def told(self, names: Mapping[str, str]) -> str:
        """The message with other names for the arguments."""
        message, *values = self.args
        return printable(Formatter().vformat(message, values, _Names(names)))

    def __str__(self) -> str:
        return self.told({})


class Refused(InputError):
    """Several unusable arguments, each with its name and error. Raised by `judge`."""

    def __init__(self, errors: Sequence[tuple[str, HooklensError]]):
        self.errors = errors
        super().__init__(self.told({}))

    def told(self, names: Mapping[str, str]) -> str:
        """All messages. A message that does not name its argument is prefixed with its name, or that in `names`."""
        lines = []
        for name, error in self.errors:
            if isinstance(error, ArgumentError | Refused):
                lines.append(error.told(names))
                continue
            shown = names.get(name, name)
            lines.append(str(error) if shown in str(error) else f"{shown}: {error}")
        return lines[0] if len(lines) == 1 else "\n- ".join([f"{len(lines)} things are wrong:", *lines])


def judge(checks: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run checks, one per argument; return their results, or raise all their errors together.

    >>> judge({"edges": lambda: int("3")})
    {'edges': 3}
    """
    values: dict[str, Any] = {}
    errors: list[tuple[str, HooklensError]] = []
    for name, check in checks.items():
        try:
            values[name] = check()
        except HooklensError as error:
            errors.append((name, error))
    if errors:
        raise Refused(errors) from errors[0][1]
    return values


class _Names(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return name


class NameNotFound(HooklensError, KeyError):
    """A name that does not exist; the message lists the closest ones."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr with quotes


class WrongType(HooklensError, TypeError):
    """An object of an unsupported type."""


class HookError(HooklensError, ValueError):
    """A hook that broke its contract: wrong shape, wrong dtype, or an in-place edit that was not returned."""


class FileRefused(HooklensError, ValueError):
    """A damaged, truncated or foreign file, refused before any of its tensors is used."""


class CheckFailed(HooklensError, RuntimeError):
    """Numbers that failed their own check; they are not returned."""


class Unavailable(HooklensError, RuntimeError):
    """Something outside the program is missing: the network, an extra package, disk space."""


def closest(name: object, known: Iterable[str], *, many: int = 3, cutoff: float = 0.5) -> list[str]:
    """The known names most like this one, upper or lower case.

    >>> closest("MEAN", ["mean", "median", "zero"], many=1)
    ['mean']
    """
    by_lower: dict[str, list[str]] = {}
    for candidate in known:
        by_lower.setdefault(candidate.lower(), []).append(candidate)
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=many, cutoff=cutoff)
    return [candidate for lower in near for candidate in by_lower[lower]][:many]


def did_you_mean(what: str, name: object, known: Iterable[str], *, many: int = 3) -> NameNotFound:
    """The error for an unknown name, with the closest names.

    >>> print(did_you_mean("site", "resid_pos", ["resid_post", "resid_pre", "z"]))
    no site named 'resid_pos'; closest: resid_post, resid_pre
    """
    known = list(known)
    if close := closest(name, known, many=many):
        return NameNotFound(f"no {what} named {name!r}; closest: {', '.join(close)}")
    shown = ", ".join(known[:12]) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
    return NameNotFound(f"no {what} named {name!r}; there are: {shown or 'none'}")
