"""Hook points, and scopes that own the hooks in them: a hook lives as long as its `with` block or its handle."""

import inspect
import itertools
import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hooklens.core.allocator import keep_freed_pages
from hooklens.core.arguments import check_target
from hooklens.core.cache import ActivationCache, Entries, converted
from hooklens.core.errors import HookError, InputError, WrongType
from hooklens.core.gradients import need_gradients
from hooklens.core.names import LAZY, Where, parse, resolve
from hooklens.core.scope import Lifetime, Scope

HookFn = Callable[[Tensor, "HookCall"], Tensor | None]

# All scopes that this thread or task has entered; a thread starts with none, a task with those of its creator.
_scopes: ContextVar[tuple[Lifetime, ...]] = ContextVar("hooklens_scopes", default=())
# Open scopes in the whole process: the only thing that a forward pass without hooks checks.
_open_scopes: set[Lifetime] = set()
_moments: ContextVar[tuple[Lifetime, ...]] = ContextVar("hooklens_moments", default=())
_order = itertools.count()


class HookCall(NamedTuple):
    """The second argument of a hook: the point's name, and the step of the generation.

    `step` is 0 for the prompt and increases with every later forward pass through the same KV cache; `offset` is the
    absolute position of the first new token. `seen` [batch key_pos] says which tokens, including cached ones, are real
    and not padding; None if nothing is padded. `to_come` is the number of tokens that may follow in later passes: 0
    without a KV cache, None if it is not known.
    """

    name: str
    step: int = 0
    offset: int = 0
    seen: Tensor | None = None
    to_come: int | None = 0

    def layer(self) -> int:
        """The layer of the point; raises if it belongs to none."""
        site = parse(self.name)
        if site is None or site.layer is None:
            raise InputError(f"the hook point {self.name!r} belongs to no layer")
        return site.layer


def this_moment(name: str) -> HookCall:
    """The HookCall for a point in the current forward pass."""
    return HookCall(name, *(moment.innermost() or ()))


class _Hook:
    """One function, or one capture, at one point. It fires while its scope or handle is open."""

    __slots__ = ("backward", "capture", "fn", "lifetime", "order")

    def __init__(self, lifetime: Lifetime, fn: HookFn | None, *, backward=False, capture: "_Capture | None" = None):
        self.lifetime, self.fn, self.backward, self.capture = lifetime, fn, backward, capture
        self.order = next(_order)


class _Capture:
    """The destination of captured activations: detached unless gradients are requested, cast on arrival."""

    def __init__(self, entries: Entries, device, dtype, grads: bool, asked: bool):
        self.entries, self.device, self.dtype, self.grads, self.asked = entries, device, dtype, grads, asked
        self.moved: dict[int, tuple[weakref.ref, Tensor]] = {}

    def take(self, name: str, act: Tensor, copy: bool) -> None:
        kept = act if self.grads else act.detach()
        self.entries[name] = self._cast(act, kept.clone() if copy else kept)
        if self.grads and act.requires_grad:
            act.register_hook(_gradient_into(weakref.ref(self.entries), name + "_grad"))

    def _cast(self, act: Tensor, kept: Tensor) -> Tensor:
        if self.device is None and self.dtype is None:
            return kept
        # A tensor of two points (resid_post, the next resid_pre) is converted once and stays one tensor.
        known = self.moved.get(id(act))
        if known is None or known[0]() is not act:
            known = self.moved[id(act)] = (weakref.ref(act), converted(kept, self.device, self.dtype))
        return known[1]


def _gradient_into(entries: Callable[[], Entries | None], name: str) -> Callable[[Tensor], None]:
    # Weakly: entries contain the activation, whose graph contains this function, and no collector sees that cycle.
    def fire(grad: Tensor) -> None:
        kept = entries()
        if kept is not None:
            kept[name] = grad.detach()

    return fire


class HookPoint(nn.Module):
    """An identity in the forward pass; its name addresses the activation for reading and editing.

    >>> point = HookPoint(); point.name = "hook_x"
    >>> point(torch.ones(2)).tolist()
    [1.0, 1.0]
    """

    #: Whether later operations may write into the activation. If so, captured activations are copied.
    overwritten = False

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.handles: dict[_Hook, None] = {}  # a dict adds and removes an item atomically

    def __call__(self, act: Tensor) -> Tensor:
        # No nn.Module.__call__: a point without listeners must cost only one check.
        if not _open_scopes and not self.handles:
            return act
        return self.forward(act)

    def forward(self, act: Tensor) -> Tensor:
        hooks = self.active()
        return dispatch(this_moment(self.name), hooks, act, self.overwritten) if hooks else act

    def hold(self, holder: Lifetime) -> None:
        """Called when a listener starts: a scope opens or a handle is made."""

    def release(self, holder: Lifetime) -> None:
        """Called when the holder ends, if it ever began; may be called twice."""

    def listening(self) -> bool:
        """Whether anything in this thread or task listens to this point. Lazy points are computed only then."""
        if not _open_scopes and not self.handles:
            return False
        return bool(self.active())

    def active(self) -> list[_Hook]:
        """The hooks that fire here in this thread or task, in order of registration."""
        hooks = list(self.handles)
        for scope in _scopes.get():
            if scope.open:
                hooks += scope.value.get(self, ())
        hooks.sort(key=lambda hook: hook.order)
        return hooks

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handles": {}}  # a copy of a model has no hooks

    # -- torch's own methods for hooking a module: `__call__` is not torch's, so they are implemented as handles

    def register_forward_hook(self, hook: Callable, *, prepend=False, with_kwargs=False, always_call=False) -> Any:
        """`hook(point, (act,), act)` as a handle; its return value is used, and an edit in place must be returned."""
        return self._torch_handle(hook, lambda act: ((act,), {}, act) if with_kwargs else ((act,), act), prepend)

    def register_forward_pre_hook(self, hook: Callable, *, prepend=False, with_kwargs=False) -> Any:
        """`hook(point, (act,))` as a handle."""
        return self._torch_handle(hook, lambda act: ((act,), {}) if with_kwargs else ((act,),), prepend)

    def register_full_backward_hook(self, hook: Callable, prepend: bool = False) -> Any:
        """`hook(point, (grad,), (grad,))` as a handle: for an identity both gradients are the same."""
        return self._torch_handle(hook, lambda grad: ((grad,), (grad,)), prepend, backward=True)

    def register_full_backward_pre_hook(self, hook: Callable, prepend: bool = False) -> Any:
        """`hook(point, (grad,))` as a handle."""
        return self._torch_handle(hook, lambda grad: ((grad,),), prepend, backward=True)

    register_backward_hook = register_full_backward_hook

    def _torch_handle(self, hook: Callable, arguments: Callable, prepend: bool, *, backward: bool = False) -> "Handle":
        if prepend:
            raise InputError("hooks at a hook point run in the order in which they were attached; leave out prepend")
        point = weakref.ref(self)

        def fn(act: Tensor, _: HookCall) -> Tensor | None:
            result = hook(point(), *arguments(act))
            while isinstance(result, tuple):
                result = result[0]
            return result

        return Handle([self], fn, backward)


def dispatch(call: HookCall, hooks: Sequence[_Hook], act: Tensor, overwritten: bool) -> Tensor:
    """Apply the edits in order, then backward hooks and captures on the result."""
    for hook in hooks:
        if hook.fn is not None and not hook.backward:
            act = run_hook(hook.fn, act, call, copy=overwritten)
    backward = [hook for hook in hooks if hook.backward]
    captures = [hook.capture for hook in hooks if hook.capture is not None]
    if backward or any(capture.grads for capture in captures):
        act = _own_node(act)
        act = act.clone() if overwritten else act  # torch forbids writing into a leaf and its views
    for hook in backward:
        if act.requires_grad:
            act.register_hook(_backward_hook(hook, call))
    for capture in captures:
        capture.entries.attention_mask = call.seen
        capture.take(call.name, act, overwritten)
    return act


def _own_node(act: Tensor) -> Tensor:
    """The same values as a separate node in the graph, so that a gradient belongs to one point only."""
    if not torch.is_grad_enabled() or not (act.is_floating_point() or act.is_complex()):
        return act
    return act.view_as(act) if act.requires_grad else act.detach().requires_grad_()


def _backward_hook(hook: _Hook, call: HookCall) -> Callable[[Tensor], Tensor | None]:
    def fire(grad: Tensor) -> Tensor | None:
        return run_hook(hook.fn, grad, call) if hook.lifetime.open and hook.fn is not None else None

    return fire


def run_hook(fn: HookFn, act: Tensor, call: HookCall, *, copy: bool = False) -> Tensor:
    """Give a hook its own activation and check its return value: None leaves the activation unchanged.

    A hook that returns None may have kept its activation for its gradient; the model then continues from the kept one.
    With `copy` the returned tensor is copied, so that nothing writes into a tensor that the hook still holds.
    """
    own = act.clone()
    before, holders = _version(own), sys.getrefcount(own)
    try:
        result = fn(own, call)
    except Exception as error:
        error.add_note(f"raised by the hook {_name_of(fn)} at {call.name}, which saw {_look(act)}")
        raise
    if result is None:
        if _version(own) != before:
            raise HookError(
                f"the hook {_name_of(fn)} at {call.name} edited its activation in place and returned None, which "
                "leaves the model unchanged; return the tensor to make the edit count"
            )
        kept = own.requires_grad and (sys.getrefcount(own) > holders or own._backward_hooks)
        # A clone: gradients pass through it to the kept tensor, and later edits of that do not reach the model.
        return own.clone() if kept and torch.is_grad_enabled() else act
    same = isinstance(result, Tensor) and result.shape == act.shape and result.dtype == act.dtype
    if not same or result.device != act.device:
        raise HookError(
            f"the hook {_name_of(fn)} at {call.name} returned {_look(result)}; expected {_look(act)}, or None to leave "
            "the activation as it is"
        )
    return result.clone() if copy and result is not own else result


def _version(act: Tensor) -> int | None:
    try:
        return act._version
    except (RuntimeError, NotImplementedError):  # inference tensors and vmap have no version
        return None


def _name_of(fn: Callable) -> str:
    return getattr(fn, "__qualname__", None) or repr(fn)


def _look(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r:.60}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"


class HookScope(Scope):
    """The hooks of one `with` block. Leaving it, even by an exception or late, ends them and no other hooks."""

    stack, anywhere = _scopes, _open_scopes

    def __init__(self, subject: Any, entries: dict[HookPoint, list[_Hook]]):
        super().__init__()
        self.subject, self.entries = subject, entries

    def begin(self) -> dict[HookPoint, list[_Hook]]:
        for point in self.entries:
            point.hold(self.lifetime)
        return self.entries

    def given(self) -> Any:
        return self.subject

    def end(self) -> None:
        self.lifetime.open = False
        for point in self.entries:
            point.release(self.lifetime)
        super().end()


class Handle:
    """A hook that stays on the model, in every thread, until `remove()`; can also be used as a `with` block."""

    def __init__(self, points: Sequence[HookPoint], fn: HookFn, backward: bool):
        self.points, self.lifetime = tuple(points), Lifetime()
        hook = _Hook(self.lifetime, fn, backward=backward)
        try:
            for point in self.points:
                point.handles[hook] = None
                point.hold(self.lifetime)
            self.lifetime.open = True
        except BaseException:
            self._end()
            raise

    def remove(self) -> None:
        """Remove the hook; calling it twice is harmless."""
        try:
            self._end()
        except BaseException:  # Ctrl-C: finish first
            self._end()
            raise

    def _end(self) -> None:
        self.lifetime.open = False
        for point in self.points:
            _take_off(point, self.lifetime)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._end()
        except BaseException:
            self._end()
            raise


def _take_off(point: HookPoint, lifetime: Lifetime) -> None:
    for hook in list(point.handles):
        if hook.lifetime is lifetime:
            point.handles.pop(hook, None)
    point.release(lifetime)


class moment(Scope):
    """Within this block, hooks are told these fields of their `HookCall`."""

    stack = _moments

    def __init__(self, step: int, offset: int, seen: Tensor | None = None, to_come: int | None = 0):
        super().__init__()
        self.told = (step, offset, seen, to_come)

    def begin(self) -> tuple[int, int, Tensor | None, int | None]:
        return self.told


def edited_elsewhere(points: Iterable[HookPoint]) -> bool:
    """Whether any of these points has a listener in this thread or task. Shortcuts that skip points fall back if so."""
    if not _open_scopes:
        return any(map(operator.attrgetter("handles"), points)) and any(point.listening() for point in points)
    return any(point.listening() for point in points)


class HookedPart(nn.Module):
    """An nn.Module that owns hook points and forbids replacing them: edits by a replaced point's name would be lost."""

    def __setattr__(self, name: str, value: Any) -> None:
        there = self.__dict__.get("_modules", {}).get(name)
        if isinstance(there, HookPoint) and there.name and value is not there:
            raise WrongType(
                f"{there.name} is a hook point and cannot be replaced by a {type(value).__name__}; to edit the "
                "activation use model.hooks(fwd_hooks=[(name, function)]). A point without listeners costs one check"
            )
        super().__setattr__(name, value)


class HookedModule(HookedPart):
    """An nn.Module whose HookPoints are addressed by name."""

    _points: Mapping[str, HookPoint]

    def name_points(self) -> None:
        """Give every HookPoint its full name; call once at the end of `__init__`."""
        self._points = {name: m for name, m in self.named_modules() if isinstance(m, HookPoint)}
        for name, point in self._points.items():
            point.name = name

    def hook_points(self) -> dict[str, HookPoint]:
        """Every point by its full name, in the order in which they fire."""
        return dict(self._points)

    def hook_names(self) -> list[str]:
        """The full name of every point, in the order in which they fire."""
        return list(self.hook_points())

    def resolve(self, where: Where) -> list[HookPoint]:
        """The points selected by a name, short site, list or predicate; unknown names raise with the closest ones."""
        return self._standing({name: self._points[name] for name in resolve(where, self.hook_names())})

    def _standing(self, points: dict[str, HookPoint]) -> list[HookPoint]:
        """The points, each checked to still be part of this module: a replaced point never fires."""
        for name, point in points.items():
            part: nn.Module | None = self
            for step in name.split("."):
                part = None if part is None else part._modules.get(step)
            if part is not point and all(module is not point for module in self.modules()):
                raise HookError(
                    f"the hook point {name!r} is no longer part of this {type(self).__name__}: it or a module around "
                    f"it was replaced (by a {type(part).__name__}); put it back, or call name_points() after it"
                )
        return list(points.values())

    def hooks(
        self, fwd_hooks: Iterable[tuple[Where, HookFn]] = (), bwd_hooks: Iterable[tuple[Where, HookFn]] = ()
    ) -> HookScope:
        """A `with` block inside which the hooks are active, in this thread or task only.

        A hook is `(act, hook) -> Tensor | None`; it may edit `act`, its own copy, and `None` leaves it unchanged.
        """
        scope = HookScope(self, {})
        self._attach(scope, fwd_hooks, scope.lifetime, backward=False)
        self._attach(scope, bwd_hooks, scope.lifetime, backward=True)
        return scope

    def _attach(
        self, scope: HookScope, hooks: Iterable[tuple[Where, HookFn]], lifetime: Lifetime, *, backward: bool
    ) -> None:
        if not isinstance(hooks, Iterable):
            given = "bwd_hooks" if backward else "fwd_hooks"
            raise WrongType(f"{given} is a list of (where, function), such as [(('z', 5), fn)]; got {hooks!r:.80}")
        for pair in hooks:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[1]):
                raise WrongType(f"a hook must be given as (where, function), for example (('z', 5), fn); got {pair!r}")
            _check_takes_two(pair[1])
            for point in self.resolve(pair[0]):
                scope.entries.setdefault(point, []).append(_Hook(lifetime, pair[1], backward=backward))

    def add_hook(self, where: Where, fn: HookFn, *, dir: str = "fwd") -> Handle:
        """Attach a hook until its handle's `remove()`, in every thread. `dir` is "fwd" or "bwd"."""
        if dir not in ("fwd", "bwd"):
            raise InputError(f"dir must be 'fwd' or 'bwd', got {dir!r}")
        if not callable(fn):
            raise WrongType(f"a hook must be a function (act, hook) -> Tensor | None, got {fn!r}")
        _check_takes_two(fn)
        return Handle(self.resolve(where), fn, dir == "bwd")

    def reset_hooks(self) -> None:
        """Remove every hook that `add_hook` attached to this model. Open `with` blocks keep theirs."""
        for point in self._points.values():
            for hook in list(point.handles):
                hook.lifetime.open = False
                _take_off(point, hook.lifetime)

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Iterable[tuple[Where, HookFn]] = (),
        bwd_hooks: Iterable[tuple[Where, HookFn]] = (),
        **kwargs: Any,
    ) -> Any:
        """Run one forward pass with these hooks. Backward hooks stay in the graph of this call, and only there."""
        scope = self.hooks(fwd_hooks)
        self._attach(scope, bwd_hooks, Lifetime(open=True), backward=True)
        with scope:
            return self(*args, **kwargs)

    def capture(
        self, where: Where | None = None, *, device=None, dtype: torch.dtype | None = None, grads: bool = False
    ) -> tuple[HookScope, ActivationCache]:
        """A scope and the cache that it fills with each named point's value after all edits, each tensor once.

        `None` means every point except the lazy ones. A second forward pass inside the scope overwrites the first.
        """
        if grads:
            need_gradients("grads=True")
        if grads and not torch.is_grad_enabled():
            raise InputError("grads=True needs gradients, which are disabled here; leave the torch.no_grad() block")
        keep_freed_pages()
        check_target(device, dtype)
        chosen = self._plain_points() if where is None else self.resolve(where)
        entries = Entries()
        scope = HookScope(self, {})
        taker = _Capture(entries, device, dtype, grads, asked=where is not None)
        for point in chosen:
            scope.entries[point] = [_Hook(scope.lifetime, None, capture=taker)]
        return scope, ActivationCache(entries, self)

    def _plain_points(self) -> list[HookPoint]:
        sites = {name: parse(name) for name in self.hook_points()}
        lazy = {name for name, point in sites.items() if point is not None and point.name in LAZY}
        return self._standing({name: point for name, point in self.hook_points().items() if name not in lazy})

    def run_with_cache(
        self,
        *args: Any,
        names: Where | None = None,
        device=None,
        dtype: torch.dtype | None = None,
        grads: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Run the model, and return its output and the activations at the named points.

        Entries are detached; with `grads=True` they stay in the graph and the caller's backward fills `<name>_grad`.
        """
        scope, cache = self.capture(names, device=device, dtype=dtype, grads=grads)
        with scope:
            output = self(*args, **kwargs)
        return output, cache


def _check_takes_two(fn: HookFn) -> None:
    """Raise unless the function can be called with an activation and a HookCall."""
    try:
        takes = inspect.signature(fn)
    except (TypeError, ValueError):  # written in C: no signature available
        return
    try:
        takes.bind(None, None)
    except TypeError as error:
        raise WrongType(
            f"a hook is called with two arguments, (act, hook) -> Tensor | None, but {_name_of(fn)} takes {takes} "
            f"({error}); write, for example, lambda act, hook: act * 0"
        ) from error
