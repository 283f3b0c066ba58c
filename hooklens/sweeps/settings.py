"""How sweeps run: memory, progress, how much is checked; set for a `with` block."""

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from hooklens.core.errors import InputError
from hooklens.progress import SHOWN


@dataclass(frozen=True)
class Settings:
    """`memory`: bytes of activations at once. `verify`: patches run again the plain way. `plain`: only that way.

    `seed` draws the patches that are verified. `progress`: bars of every method, True, False or None (where somebody is
    looking: on a terminal and in a notebook).
    """

    memory: int = 256 * 2**20
    verify: int = 2
    seed: int = 0
    plain: bool = False
    progress: bool | None = None


_DEFAULTS = Settings()
_settings: ContextVar[Settings] = ContextVar("hooklens_sweep_settings", default=_DEFAULTS)


class engine:
    """A `with` block in which sweeps run with other settings.

    >>> with engine(verify=0, memory=64 * 2**20):
    ...     current().memory
    67108864
    """

    def __init__(self, **changes: Any):
        known = Settings.__dataclass_fields__
        wrong = [name for name in changes if name not in known]
        if wrong:
            raise InputError(f"sweeps have no setting {wrong[0]!r}; there are {', '.join(known)}")
        for name in ("memory", "verify"):
            value = changes.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"{name} is a whole number of at least 0, got {value!r}")
        if changes.get("progress") not in (None, False, True):
            raise InputError(f"progress is True, False or None (where somebody looks), got {changes['progress']!r}")
        self.changes = changes

    def __enter__(self) -> Settings:
        self.before = _settings.get()
        _settings.set(replace(self.before, **self.changes))
        SHOWN.set(current().progress)
        return _settings.get()

    def __exit__(self, *exc: object) -> None:
        _settings.set(self.before)
        SHOWN.set(self.before.progress)


def current() -> Settings:
    """The settings in force here."""
    return _settings.get()
