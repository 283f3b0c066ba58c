"""`with` blocks that apply to one thread or task, and end with their block even if interrupted."""

from contextvars import ContextVar
from typing import Any, ClassVar

from hooklens.core.errors import InputError


class Lifetime:
    """The lifetime of a setting: in effect while `open`. `value` is the setting; once closed, it keeps nothing alive.

    Scopes refer to what they own, and owned objects refer to a lifetime, never to the scope. So there are no reference
    cycles, and memory is freed when the last reference is dropped.
    """

    __slots__ = ("open", "value")

    def __init__(self, *, open: bool = False):
        self.open = open
        self.value: Any = None


class Scope:
    """A `with` block of one thread or task.

    `stack` lists the scopes that this thread or task has entered, innermost last. `anywhere` contains the scopes open
    in the whole process. It is checked first, so that code outside every scope costs one check and compiles completely.

    Ctrl-C may come between any two instructions, including in this class. So `open` is set last, each step of the exit
    can be repeated, and an interrupted entry or exit is undone before the interrupt continues. A scope without
    references ends too, which covers Ctrl-C at the first instruction of `__exit__`.
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
            # Scopes that ended in another context may still be listed in this one; remove them now.
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
        lifetime = getattr(self, "lifetime", None)  # None if __init__ was interrupted
        if lifetime is not None and lifetime.open:
            self.end()

    def begin(self) -> Any:
        """The value that is in effect inside the block."""

    def given(self) -> Any:
        """The value that `with ... as` binds."""
        return self

    def end(self) -> None:
        """Undo `begin`, however far it got."""
        self.lifetime.open = False
        # By identity, not by token: the block may end in a different context than it began in.
        self.stack.set(tuple(held for held in self.stack.get() if held is not self.lifetime))
        self.anywhere.discard(self.lifetime)
        self.lifetime.value = None

    @classmethod
    def innermost(cls) -> Any:
        """The value of the innermost open scope of this kind in this thread or task; None outside all scopes."""
        for held in reversed(cls.stack.get()):
            if held.open:
                return held.value
        return None
