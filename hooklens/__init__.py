"""hooklens: every activation of a transformer by name, and the experiments that use them.

>>> import hooklens as hl
>>> hl.site("z", 5)
Site(name='z', layer=5, part=None)
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hooklens.public import *  # noqa: F403
    from hooklens.public import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        """Import public names on first use: torch takes seconds to import, and `hooklens --help` does not need it."""
        from importlib import import_module

        public = import_module("hooklens.public") if name == "__all__" or not name.startswith("_") else None
        if public is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, getattr(public, name))

    def __dir__() -> list[str]:
        return sorted({*__getattr__("__all__"), *globals()})
