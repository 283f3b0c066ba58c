"""wrap(any nn.Module): the same hooks, scopes and cache for a module that was written without hook points."""

import copy
import dataclasses
import re
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from hooklens.core.errors import HookError, WrongType, did_you_mean
from hooklens.core.hooks import HookedModule, HookPoint, dispatch, this_moment
from hooklens.core.names import Where, flatten

# How often each point has fired in the call of a wrapped module under way; None outside of one.
_fired: ContextVar[dict["ModulePoint", int] | None] = ContextVar("hooklens_fired", default=None)
_install = threading.Lock()
_NUMBERED = re.compile(r"^(?P<name>.+)#(?P<call>\d+)$")


def wrap(module: nn.Module) -> "WrappedModule":
    """Any module with hook points at the entry and exit of each of its submodules; the module itself stays as it is.

    >>> net = wrap(nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True)))
    >>> net.hook_names()
    ['hook_in', 'hook_out', '0.hook_in', '0.hook_out', '1.hook_in', '1.hook_out']
    >>> import torch
    >>> out, cache = net.run_with_cache(torch.ones(1, 2), names=["0.hook_out", "hook_out"])
    >>> torch.equal(cache["0.hook_out"].relu(), cache["hook_out"])
    True
    """
    if not isinstance(module, nn.Module):
        raise WrongType(f"wrap takes a torch.nn.Module, got {module!r:.80}")
    return WrappedModule(module)


class WrappedModule(HookedModule):
    """A module, shared and not copied, whose submodules' inputs and outputs are hook points.

    A point is `<path>.hook_in` (the first tensor among the arguments, then among the keywords) or `<path>.hook_out`
    (the first tensor in what is returned). A name asks for every call of its submodule in one forward pass; the second
    call is known as `name#1`, and `name#0` or `name#1` ask for one call only. A point that is asked for and does not
    fire raises.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.training = module, module.training
        self._points: dict[str, ModulePoint] = {}  # type: ignore[assignment]  # narrower than any HookPoint
        for path, part in module.named_modules():
            # Containers such as ModuleList have no forward and are never called.
            if type(part).forward is not nn.Module.forward and not isinstance(part, HookPoint):
                for side in ("in", "out"):
                    name = f"{path}.hook_{side}" if path else f"hook_{side}"
                    self._points[name] = ModulePoint(name, part, side)

    def hook_points(self) -> dict[str, HookPoint]:
        """Every point by its name, module by module; points of single calls (`name#1`) are not listed."""
        return {name: point for name, point in self._points.items() if point.every is None}

    def hook_names(self) -> list[str]:
        """The name of every point, module by module."""
        return list(self.hook_points())

    def resolve(self, where: Where) -> list[HookPoint]:
        """The points that a name, `name#1`, site, list or predicate asks for; unknown ones raise with the nearest."""
        found: dict[HookPoint, None] = {}
        for one in flatten(where):
            numbered = _NUMBERED.match(one) if isinstance(one, str) else None
            points = super().resolve(one) if numbered is None else [self._of_call(numbered)]
            found.update(dict.fromkeys(points))
        return list(found)

    def _of_call(self, numbered: re.Match) -> "ModulePoint":
        every = self._points.get(numbered["name"])
        if every is None:
            raise did_you_mean("hook point", numbered["name"], self.hook_names())
        call = int(numbered["call"])
        if call not in every.calls:
            every.calls[call] = self._points[f"{every.name}#{call}"] = ModulePoint(
                f"{every.name}#{call}", every.links[0], every.side, every
            )
        return every.calls[call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns; then every point that was asked for must have fired."""
        before = _fired.get()
        fired: dict[ModulePoint, int] = {}
        _fired.set(fired)
        try:
            output = self.module(*args, **kwargs)
        finally:
            _fired.set(before)
        self._check(fired)
        return output

    def _check(self, fired: "dict[ModulePoint, int]") -> None:
        for point in list(self._points.values()):
            if point in fired:
                continue
            if any(hook.capture is None or hook.capture.asked for hook in point.active()):
                times = "" if point.every is None else f" (its module was called {fired.get(point.every, 0)} times)"
                raise HookError(
                    f"the hook point {point.name!r} did not fire in this call{times}: its module was not called, or no "
                    f"tensor is among what it {'was given' if point.side == 'in' else 'returned'}; hook another point"
                )

    def __repr__(self) -> str:
        return f"WrappedModule({type(self.module).__name__}: {len(self.hook_names())} hook points)"


class ModulePoint(HookPoint):
    """The entry or exit of a module that knows nothing of it: torch's own hook, there only while somebody listens."""

    overwritten = True  # a module may work in place on what it is given and on what it returned

    def __init__(self, name: str, part: nn.Module, side: str, every: "ModulePoint | None" = None):
        super().__init__()
        self.name, self.side = name, side
        self.links = (part, every)  # in a tuple: neither is a submodule of this point
        self.calls: dict[int, ModulePoint] = {}
        self.held = 0
        self.torch_hook: _TorchHook | None = None

    @property
    def every(self) -> "ModulePoint | None":
        """The point of all calls, where this is that of one."""
        return self.links[1]

    def hold(self) -> None:
        """Install torch's hook, unless somebody else has."""
        if self.every is not None:
            return self.every.hold()
        with _install:
            self.held += 1
            if self.torch_hook is None:
                self.torch_hook = _TorchHook(self, self.links[0])

    def release(self) -> None:
        """Remove torch's hook when the last one leaves."""
        if self.every is not None:
            return self.every.release()
        with _install:
            self.held -= 1
            if not self.held and self.torch_hook is not None:
                self.torch_hook.installed.remove()
                self.torch_hook = None

    def fire(self, act: Tensor) -> Tensor:
        """The hooks of this call, those of every call among them."""
        fired = _fired.get()
        call = 0 if fired is None else fired.get(self, 0)
        one = self.calls.get(call)
        if fired is not None:
            fired.update({self: call + 1} if one is None else {self: call + 1, one: 1})
        hooks = self.active() + ([] if one is None else one.active())
        if not hooks:
            return act
        hooks.sort(key=lambda hook: hook.order)
        return dispatch(this_moment(f"{self.name}#{call}" if call else self.name), hooks, act, self.overwritten)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "held": 0, "torch_hook": None}


class _TorchHook:
    """What torch calls. A copy of it, made with a copy of the module, belongs to no point and does nothing."""

    def __init__(self, point: ModulePoint, part: nn.Module):
        self.point = point
        if point.side == "in":
            self.installed = part.register_forward_pre_hook(self, with_kwargs=True)
        else:
            self.installed = part.register_forward_hook(self)

    def __call__(self, part: nn.Module, args: tuple, given: Any) -> Any:
        point = self.point
        if point.torch_hook is not self:
            return None
        if point.side == "out":
            return _through(given, point.fire)
        if any(isinstance(arg, Tensor) for arg in args):
            return _through(args, point.fire), given
        return args, _through(given, point.fire)


def _through(value: Any, fire: Callable[[Tensor], Tensor]) -> Any:
    """The value with its first tensor as `fire` leaves it; containers are copied, never written to."""
    if isinstance(value, Tensor):
        return fire(value)
    is_data = dataclasses.is_dataclass(value) and not isinstance(value, Mapping | tuple)
    items = vars(value) if is_data else value if isinstance(value, Mapping) else None
    if items is None:
        items = dict(enumerate(value)) if isinstance(value, tuple | list) else {}
    key = next((key for key, item in items.items() if isinstance(item, Tensor)), None)
    if key is None or (used := fire(items[key])) is items[key]:
        return value
    if isinstance(value, tuple | list):
        changed = [*value[:key], used, *value[key + 1 :]]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    changed = copy.copy(value)
    if is_data:
        object.__setattr__(changed, key, used)
    else:
        changed[key] = used
    return changed
