"""`with` blocks that hold for one thread or task, and end with their block whatever interrupts them."""

from contextvars import ContextVar
from typing import Any, ClassVar

from hooklens.core.errors import InputError


class Lifetime:
    """How long something holds: while `open`. `value` is what holds then; who still lists it afterwards keeps nothing.

    Scopes refer to what they own and what is owned refers to a lifetime, never to the scope: so nothing here is a
    cycle, and memory is free as soon as the last reference goes.
    """

    __slots__ = ("open", "value")

    def __init__(self, *, open: bool = False):
        self.open = open
        self.value: Any = None


class Scope:
    """A `with` block that this thread or task is in.

    `stack` lists what this thread or task has entered, innermost last. `anywhere` holds what is open in the whole
    process: it is looked at first, so that code outside of every scope costs one check and compiles whole.

    Ctrl-C may fall between any two instructions, also in here. So `open` is set last, each step of the way out may be
    taken twice, and what is interrupted on the way in or out is undone before the interrupt goes on. A scope that
    nobody refers to any more ends too: Ctrl-C at the first instruction of `__exit__` leaves it to that.
    """

    stack: ClassVar[ContextVar[tuple[Lifetime, ...]]]
    anywhere: ClassVar[set[Lifetime]] = set()

    def __init__(self) -> None:
        self.lifetime = Lifetime()

    def __enter__(self) -> Any:
        if self.lifetime.open:
            raise InputError(f"this {type(self).__name__} is already open; make a new one for a block inside its block")
        try:
            self.lifetime.value = self.begin()
            # Scopes that ended in another context are still listed in this one: they go now.
            self.stack.set((*(held for held in self.stack.get() if held.open), self.lifetime))
            self.anywhere.add(self.lifetime)
            self.lifetime.open = True
            return self.given()
        except BaseException:
            self.end()
            raise

    def __exit__(self, *exc: object) -> None:
        try:
            self.end()
        except BaseException:
            self.end()
            raise

    def __del__(self) -> None:
        lifetime = getattr(self, "lifetime", None)  # None where __init__ was interrupted
        if lifetime is not None and lifetime.open:
            self.end()

    def begin(self) -> Any:
        """What holds inside the block."""

    def given(self) -> Any:
        """What `with ... as` binds."""
        return self

    def end(self) -> None:
        """The way out, from wherever the way in has come to."""
        self.lifetime.open = False
        # By identity, not by token: the block may end in another context than the one it began in.
        self.stack.set(tuple(held for held in self.stack.get() if held is not self.lifetime))
        self.anywhere.discard(self.lifetime)
        self.lifetime.value = None

    @classmethod
    def innermost(cls) -> Any:
        """The value of the innermost open scope of this kind in this thread or task; None outside of all."""
        for held in reversed(cls.stack.get()):
            if held.open:
                return held.value
        return None
