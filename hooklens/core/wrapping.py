"""wrap(any nn.Module): the same hooks, scopes and cache for a module without hook points."""

import copy
import dataclasses
import re
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from hooklens.core.errors import HookError, WrongType, did_you_mean
from hooklens.core.hooks import HookCall, HookedModule, HookPoint, dispatch, this_moment
from hooklens.core.names import Where, flatten
from hooklens.core.scope import Lifetime, Scope

_calls: ContextVar[tuple[Lifetime, ...]] = ContextVar("hooklens_calls", default=())
# The last information given to a clock, and its period of being held: (period, (step, offset, seen)).
_told: ContextVar[tuple[Any, tuple] | None] = ContextVar("hooklens_told", default=None)
# (step, offset) of the last call with each KV cache of transformers.
_steps: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()
_install = threading.Lock()
_NUMBERED = re.compile(r"^(?P<name>.+)#(?P<call>\d+)$")


def wrap(module: nn.Module) -> "WrappedModule":
    """Add hook points at the entry and exit of each submodule of any module; the module itself is unchanged.

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

    A point is `<path>.hook_in` (the first tensor in the arguments, then in the keywords) or `<path>.hook_out` (the
    first tensor in the return value). A name selects every call of its submodule in one forward pass; the second call
    is named `name#1`, and `name#0` or `name#1` select a single call. A selected point that does not fire raises an
    error.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.training = module, module.training
        self._points: dict[str, ModulePoint] = {}
        clock = _Clock(module)
        for path, part in module.named_modules():
            # Containers such as ModuleList have no forward and are never called.
            if type(part).forward is not nn.Module.forward and not isinstance(part, HookPoint):
                for side in ("in", "out"):
                    name = f"{path}.hook_{side}" if path else f"hook_{side}"
                    self._points[name] = ModulePoint(name, part, side, clock)

    def hook_points(self) -> dict[str, HookPoint]:
        """Every point by its name, module by module; points of single calls (`name#1`) are not listed."""
        return {name: point for name, point in self._points.items() if point.every() is None}

    def resolve(self, where: Where) -> list[HookPoint]:
        """The points selected by a name, `name#1`, site, list or predicate; unknown ones raise with the closest."""
        chosen: dict[HookPoint, None] = {}
        for selector in flatten(where):
            numbered = _NUMBERED.match(selector) if isinstance(selector, str) else None
            points = super().resolve(selector) if numbered is None else [self._of_call(numbered)]
            chosen.update(dict.fromkeys(points))
        return list(chosen)

    def _standing(self, points: dict[str, HookPoint]) -> list[HookPoint]:
        return list(points.values())  # they are not part of the module; a point whose module is not called raises

    def _of_call(self, numbered: re.Match) -> "ModulePoint":
        every = self._points.get(numbered["name"])
        if every is None:
            raise did_you_mean("hook point", numbered["name"], self.hook_names())
        call = int(numbered["call"])
        if call not in every.calls:
            name = f"{every.name}#{call}"
            every.calls[call] = self._points[name] = ModulePoint(name, every.part(), every.side, every.clock, every)
        return every.calls[call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; then check that every selected point has fired."""
        with _Call() as fired:
            output = self.module(*args, **kwargs)
            self._check(fired)
        return output

    def _check(self, fired: "dict[ModulePoint, int]") -> None:
        for point in list(self._points.values()):
            if point in fired:
                continue
            if any(hook.capture is None or hook.capture.asked for hook in point.active()):
                times = "" if point.every() is None else f" (its module was called {fired.get(point.every(), 0)} times)"
                raise HookError(
                    f"the hook point {point.name!r} did not fire in this call{times}: its module was not called, or "
                    f"{'was given' if point.side == 'in' else 'returned'} no tensor; hook another point"
                )

    def __repr__(self) -> str:
        return f"WrappedModule({type(self.module).__name__}: {len(self.hook_names())} hook points)"


class _Call(Scope):
    """How often each point has fired in the current call of a wrapped module."""

    stack = _calls

    def begin(self) -> "dict[ModulePoint, int]":
        return {}

    def given(self) -> "dict[ModulePoint, int]":
        return self.lifetime.value


class _Weak:
    """A weak reference that is copied and pickled together with its target."""

    def __init__(self, target: Any):
        self.ref = (lambda: None) if target is None else weakref.ref(target)

    def __call__(self) -> Any:
        return self.ref()

    def __reduce__(self) -> tuple:
        return _Weak, (self(),)


class _Listener(ABC):
    """torch's own hooks on one module, installed only while the listener has holders.

    The module refers to its listener, not vice versa: a cycle would keep both until the collector runs.
    """

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = _Weak(part)
        self.holders: set[Lifetime] = set()
        self.live: weakref.ref[_TorchHook] | None = None

    def hold(self, holder: Lifetime) -> None:
        """Install torch's hook, unless it is installed already."""
        with _install:
            self.holders.add(holder)
            part = self.part()
            if self.live is None and part is not None:
                hook = _TorchHook(self)
                self.install(part, hook)
                self.live = weakref.ref(hook)

    def release(self, holder: Lifetime) -> None:
        """Remove torch's hook when the last holder leaves."""
        with _install:
            self.holders.discard(holder)
            part = self.part()
            if not self.holders and part is not None:
                self.live = None
                _uninstall(part, self)

    @abstractmethod
    def install(self, part: nn.Module, hook: "_TorchHook") -> None:
        """Register torch's hook on the module."""

    @abstractmethod
    def called(self, args: tuple, given: Any) -> Any:
        """The module is called with these arguments, or has returned `given`."""

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        return {**state, "holders": set(), "live": None}  # a copy has no holders


class ModulePoint(_Listener, HookPoint):
    """The entry or exit of a module that was written without hook points."""

    overwritten = True  # a module may modify its inputs and outputs in place

    def __init__(self, name: str, part: nn.Module, side: str, clock: "_Clock", every: "ModulePoint | None" = None):
        super().__init__(part)
        self.name, self.side, self.clock = name, side, clock
        #: The point of all calls, if this is the point of one call. Weakly, because it lists this one.
        self.every = _Weak(every)
        self.calls: dict[int, ModulePoint] = {}

    def hold(self, holder: Lifetime) -> None:
        every = self.every()
        if every is not None:
            return every.hold(holder)
        self.clock.hold(holder)
        super().hold(holder)

    def release(self, holder: Lifetime) -> None:
        every = self.every()
        if every is not None:
            return every.release(holder)
        super().release(holder)
        self.clock.release(holder)

    def install(self, part: nn.Module, hook: "_TorchHook") -> None:
        if self.side == "in":
            part.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            part.register_forward_hook(hook)

    def called(self, args: tuple, given: Any) -> Any:
        if self.side == "out":
            return _through(given, self.fire)
        if any(isinstance(arg, Tensor) for arg in args):
            return _through(args, self.fire), given
        return args, _through(given, self.fire)

    def fire(self, act: Tensor) -> Tensor:
        """The hooks of this call, including those of every call."""
        fired = _Call.innermost()
        call = 0 if fired is None else fired.get(self, 0)
        numbered = self.calls.get(call)
        if fired is not None:
            fired.update({self: call + 1} if numbered is None else {self: call + 1, numbered: 1})
        hooks = self.active() + ([] if numbered is None else numbered.active())
        if not hooks:
            return act
        hooks.sort(key=lambda hook: hook.order)
        return dispatch(self.clock.moment(f"{self.name}#{call}" if call else self.name), hooks, act, self.overwritten)


class _Clock(_Listener):
    """The step of the generation, from the KV cache that transformers passes to the wrapped module."""

    def moment(self, name: str) -> HookCall:
        """The HookCall for this point."""
        told = _told.get()
        # Information from an earlier period of holding is out of date: Ctrl-C may have ended its call.
        return HookCall(name, *told[1]) if told is not None and told[0] is self.live else this_moment(name)

    def install(self, part: nn.Module, hook: "_TorchHook") -> None:
        part.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)

    def called(self, args: tuple, given: dict[str, Any]) -> None:
        # Recognised by its methods: its name is past_key_values in some versions of transformers, cache in others.
        past = next((value for value in (*args, *given.values()) if hasattr(value, "get_seq_length")), None)
        if past is None:
            _told.set(None)
            return
        step, offset = _steps.get(past, (0, 0))
        now = int(past.get_seq_length())
        step = 0 if now == 0 else step + (now != offset)
        _steps[past] = step, now
        _told.set((self.live, (step, now, _seen(args, given, now))))


def _seen(args: tuple, given: dict[str, Any], offset: int) -> Tensor | None:
    """Which tokens are real, from a mask [batch key_pos] over cached and new tokens; None if all are."""
    mask = given.get("attention_mask")
    new = next((value for value in (*args, *given.values()) if isinstance(value, Tensor)), None)
    if not isinstance(mask, Tensor) or new is None or mask.shape != (new.shape[0], offset + new.shape[1]):
        return None
    return None if bool(mask.all()) else mask.bool()


class _TorchHook:
    """The function that torch calls. A copy, made with a copy of the module, has no listener and does nothing."""

    def __init__(self, listener: _Listener):
        self.listener = listener

    def __call__(self, part: nn.Module, args: tuple, given: Any) -> Any:
        live = self.listener.live
        return self.listener.called(args, given) if live is not None and live() is self else None


def _uninstall(part: nn.Module, listener: _Listener) -> None:
    # Searched for, not removed by a handle: Ctrl-C may have come between torch's entry and the handle that it returns.
    for hooks in (part._forward_hooks, part._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, _TorchHook) and hook.listener is listener:
                part._forward_pre_hooks_with_kwargs.pop(key, None)
                hooks.pop(key, None)


def _through(value: Any, fire: Callable[[Tensor], Tensor]) -> Any:
    """The value with its first tensor replaced by the result of `fire`; containers are copied, never modified."""
    if isinstance(value, Tensor):
        return fire(value)
    is_data = dataclasses.is_dataclass(value) and not isinstance(value, Mapping | tuple)
    items: Mapping[Any, Any] = {}
    if is_data:
        items = vars(value)
    elif isinstance(value, Mapping):
        items = value
    elif isinstance(value, tuple | list):
        items = dict(enumerate(value))
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
