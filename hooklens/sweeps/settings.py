"""How sweeps run: memory, progress, how much is checked; set for a `with` block."""

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from hooklens.core.errors import InputError
from hooklens.core.scope import Lifetime, Scope


@dataclass(frozen=True)
class Settings:
    """`memory`: bytes of activations at once. `verify`: patches run again the plain way. `plain`: only that way."""

    memory: int = 256 * 2**20
    verify: int = 2
    seed: int = 0
    plain: bool = False
    progress: bool | None = None


_DEFAULTS = Settings()
_settings: ContextVar[tuple[Lifetime, ...]] = ContextVar("hooklens_sweep_settings", default=())


class engine(Scope):
    """A `with` block in which sweeps run with other settings.

    >>> with engine(verify=0, memory=64 * 2**20):
    ...     current().memory
    67108864
    """

    stack = _settings

    def __init__(self, **changes: Any):
        super().__init__()
        known = Settings.__dataclass_fields__
        wrong = [name for name in changes if name not in known]
        if wrong:
            raise InputError(f"sweeps have no setting {wrong[0]!r}; there are {', '.join(known)}")
        for name in ("memory", "verify"):
            value = changes.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"{name} is a whole number of at least 0, got {value!r}")
        self.changes = changes

    def begin(self) -> Settings:
        return replace(current(), **self.changes)

    def given(self) -> Settings:
        return self.lifetime.value


def current() -> Settings:
    """The settings in force here."""
    return engine.innermost() or _DEFAULTS
