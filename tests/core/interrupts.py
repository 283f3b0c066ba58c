"""KeyboardInterrupt before every instruction at which CPython may see a signal, one run for each."""

import dis
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FrameType
from typing import Any


@cache
def never(code: CodeType) -> frozenset[int]:
    """Offsets before which CPython looks for no signal, and with which no handler of Python code could deal.

    These are a function's return of a value it has, and the way out of a `with` block: three None and the call.
    """
    steps = list(dis.get_instructions(code))
    found = set()
    for i, step in enumerate(steps):
        returns = [one.opname for one in steps[i : i + 2]] == ["LOAD_CONST", "RETURN_VALUE"]
        if step.opname == "RETURN_VALUE" or returns:
            found.add(step.offset)
        nones = steps[i : i + 3]
        if len(nones) == 3 and all(one.opname == "LOAD_CONST" and one.argval is None for one in nones):
            found |= {one.offset for one in steps[i : i + 6] if one.opname in ("LOAD_CONST", "PRECALL", "CALL")}
    return frozenset(found)


class Interrupter:
    """A trace function that raises KeyboardInterrupt at the n-th instruction inside the files named."""

    def __init__(self, at: int, files: tuple[str, ...]):
        self.left, self.files, self.where = at, files, ""

    def __call__(self, frame: FrameType, event: str, arg: Any) -> "Interrupter | None":
        if not frame.f_code.co_filename.endswith(self.files) or frame.f_code.co_name == "__del__":
            return None  # what is raised in a finaliser Python itself reports and drops
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lasti not in never(frame.f_code):
            self.left -= 1
            if self.left == 0:
                self.where = f"{frame.f_code.co_qualname}, line {frame.f_lineno}, byte {frame.f_lasti}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def interrupted(work: Callable[[], Any], files: tuple[str, ...]) -> Iterator[str]:
    """Run `work` again and again, interrupted one instruction later each time, and say where it was."""
    at, tracing = 0, sys.gettrace()
    while True:
        at += 1
        interrupter = Interrupter(at, files)
        try:
            sys.settrace(interrupter)
            try:
                work()
            finally:
                sys.settrace(tracing)
        except KeyboardInterrupt:
            pass
        if not interrupter.where:
            return
        yield interrupter.where  # with the traceback gone, and what only its frames referred to
