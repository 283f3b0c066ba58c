"""How sweeps run: memory, progress, kernel, how much is checked; set for a `with` block."""

from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from hooklens.core import progress_bar as progress
from hooklens.core.arguments import seed_number, whole
from hooklens.core.errors import InputError, Unavailable
from hooklens.core.scope import Lifetime, Scope
from hooklens.model.linear import packed_linears

KERNELS = ("linear", "packed")


@dataclass(frozen=True)
class Settings:
    """`memory`: bytes of activations at once. `verify`: patches run plainly too, or their cost. `plain`: only plainly.

    `kernel` is how linear layers multiply: "linear" is torch's product, "packed" one on weights packed for the CPU, and
    None the one that was faster when it was measured at the start of the process. The two differ in the last bits.
    `seed` draws the patches that are verified. `progress`: bars of every method, True, False or None (on a terminal
    and in a notebook).
    """

    memory: int = 256 * 2**20
    verify: int = 2
    seed: int = 0
    plain: bool = False
    progress: bool | None = None
    kernel: str | None = None


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
            whole(name, changes.get(name, 1))
        seed_number(changes.get("seed", 0))
        if changes.get("kernel") not in (None, *KERNELS):
            raise InputError(f"kernel is 'linear', 'packed' or None (the faster one), got {changes['kernel']!r}")
        if changes.get("progress") not in (None, False, True):
            raise InputError(f"progress is True, False or None (on a terminal), got {changes['progress']!r}")
        self.changes = changes
        self.block = pinned(changes.get("kernel"))

    def begin(self) -> Settings:
        self.block.__enter__()
        return replace(current(), **self.changes)

    def given(self) -> Settings:
        return self.lifetime.value

    def end(self) -> None:
        super().end()
        self.block.__exit__(None, None, None)


def pinned(kernel: str | None) -> packed_linears | nullcontext[None]:
    """A `with` block in which linear layers multiply in this way; None leaves the choice as it is."""
    if kernel is None:
        return nullcontext()
    block = packed_linears(rows=1024, enabled=kernel == "packed")
    if kernel == "packed" and not block.enabled:
        raise Unavailable(
            "packed products were asked for, and they do not run here (another CPU or torch, or "
            "HOOKLENS_PACKED_LINEARS=0); use kernel='linear'"
        )
    return block


def current() -> Settings:
    """The settings in force here."""
    return engine.innermost() or _DEFAULTS


progress.asked = lambda: current().progress
