"""Hook points, and scopes that own the hooks in them: a hook lives as long as its `with` block or its handle."""

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hooklens.core.cache import ActivationCache, Entries, converted
from hooklens.core.errors import HookError, InputError, NameNotFound, WrongType
from hooklens.core.names import LAZY, Where, parse, resolve

HookFn = Callable[[Tensor, "HookCall"], Tensor | None]

# Every scope that this thread or task has entered; a thread starts with none, a task with those of its creator.
_scopes: ContextVar[tuple["HookScope", ...]] = ContextVar("hooklens_scopes", default=())
# (step, offset, seen) of the forward pass under way, for hooks that act at chosen steps or positions.
_moment: ContextVar[tuple[int, int, Tensor | None]] = ContextVar("hooklens_moment", default=(0, 0, None))
_order = itertools.count()
#: Held while a process-wide count of open blocks changes: += alone is not one step between threads.
counting = threading.Lock()
# Open scopes in the whole process: the one thing that an unhooked forward pass looks at.
_open_scopes = 0


class HookCall(NamedTuple):
    """What a hook is told beside the activation: the point's name, and when in a generation this is.

    `step` is 0 for the prompt and counts up with every later forward pass through the same KV cache; `offset` is the
    absolute position of the first new token. `seen` [batch key_pos] says which tokens, cached ones included, are real
    and not padding; None where nothing is padded.
    """

    name: str
    step: int = 0
    offset: int = 0
    seen: Tensor | None = None

    def layer(self) -> int:
        """The layer of the point; raises where it belongs to none."""
        found = parse(self.name)
        if found is None or found.layer is None:
            raise InputError(f"the hook point {self.name!r} belongs to no layer")
        return found.layer


def this_moment(name: str) -> HookCall:
    """What hooks at a point are told in the forward pass under way."""
    return HookCall(name, *_moment.get())


class _Hook:
    """One function, or one capture, at one point. It fires while its owner (a scope or a handle) is open."""

    __slots__ = ("backward", "capture", "fn", "order", "owner")

    def __init__(self, owner, fn: HookFn | None, *, backward: bool = False, capture: "_Capture | None" = None):
        self.owner, self.fn, self.backward, self.capture = owner, fn, backward, capture
        self.order = next(_order)


class _Capture:
    """Where captured activations go, and how: detached unless gradients are asked for, cast on arrival."""

    def __init__(self, entries: Entries, device, dtype, grads: bool, asked: bool):
        self.entries, self.device, self.dtype, self.grads, self.asked = entries, device, dtype, grads, asked
        self.moved: dict[int, tuple[weakref.ref, Tensor]] = {}

    def take(self, name: str, act: Tensor, copy: bool) -> None:
        kept = act if self.grads else act.detach()
        self.entries[name] = self._cast(act, kept.clone() if copy else kept)
        if self.grads and act.requires_grad:
            act.register_hook(lambda grad: self.entries.__setitem__(name + "_grad", grad.detach()))

    def _cast(self, act: Tensor, kept: Tensor) -> Tensor:
        if self.device is None and self.dtype is None:
            return kept
        # One tensor that stands at two points (resid_post, the next resid_pre) is moved once and stays one.
        known = self.moved.get(id(act))
        if known is None or known[0]() is not act:
            known = self.moved[id(act)] = (weakref.ref(act), converted(kept, self.device, self.dtype))
        return known[1]


class HookPoint(nn.Module):
    """An identity in the forward pass, by whose name an activation is seen and edited.

    >>> point = HookPoint(); point.name = "hook_x"
    >>> point(torch.ones(2)).tolist()
    [1.0, 1.0]
    """

    #: May what comes after the point write into its activation? Then what is kept of it is copied.
    overwritten = False

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.handles: tuple[_Hook, ...] = ()

    def __call__(self, act: Tensor) -> Tensor:
        # No nn.Module.__call__: a point that nobody listens to must cost one check.
        if _open_scopes == 0 and not self.handles:
            return act
        return self.forward(act)

    def forward(self, act: Tensor) -> Tensor:
        hooks = self.active()
        return dispatch(this_moment(self.name), hooks, act, self.overwritten) if hooks else act

    def hold(self) -> None:
        """Somebody begins to listen: a scope opens or a handle is made."""

    def release(self) -> None:
        """Who began to listen ends."""

    def listening(self) -> bool:
        """Does anybody, in this thread or task, see this point? Lazy points are computed only then."""
        if _open_scopes == 0 and not self.handles:
            return False
        return bool(self.active())

    def active(self) -> list[_Hook]:
        """The hooks that fire here in this thread or task, in order of registration."""
        hooks = list(self.handles)
        for scope in _scopes.get():
            if scope.open:
                hooks += scope.entries.get(self, ())
        hooks.sort(key=lambda hook: hook.order)
        return hooks

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handles": ()}  # a copy of a model carries no hooks


def dispatch(call: HookCall, hooks: Sequence[_Hook], act: Tensor, overwritten: bool) -> Tensor:
    """The edits in their order, then backward hooks and captures on what the edits left."""
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
    """The same values as a node of their own in the graph, so that a gradient belongs to one point only."""
    if not torch.is_grad_enabled() or not (act.is_floating_point() or act.is_complex()):
        return act
    return act.view_as(act) if act.requires_grad else act.detach().requires_grad_()


def _backward_hook(hook: _Hook, call: HookCall) -> Callable[[Tensor], Tensor | None]:
    def fire(grad: Tensor) -> Tensor | None:
        return run_hook(hook.fn, grad, call) if hook.owner.open and hook.fn is not None else None

    return fire


def run_hook(fn: HookFn, act: Tensor, call: HookCall, *, copy: bool = False) -> Tensor:
    """Give a hook an activation of its own and check what comes back: None leaves the activation as it is.

    With `copy` what the hook returned is copied, so that nobody writes into a tensor that the hook still holds.
    """
    own = act.clone()
    before = _version(own)
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
        return act
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
    except (RuntimeError, NotImplementedError):  # inference tensors and vmap keep no version
        return None


def _name_of(fn: Callable) -> str:
    return getattr(fn, "__qualname__", None) or repr(fn)


def _look(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r:.60}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"


class HookScope:
    """The hooks of one `with` block. Leaving it, also by an exception or late, ends them; nobody else's are touched."""

    def __init__(self, subject: Any, entries: dict[HookPoint, list[_Hook]]):
        self.subject, self.entries, self.open = subject, entries, False

    def __enter__(self) -> Any:
        global _open_scopes
        if self.open:
            raise InputError("this hook scope is already open; make a new one with model.hooks(...)")
        self.open = True
        # Scopes that ended in another context are still listed in this one: they go now.
        _scopes.set((*(scope for scope in _scopes.get() if scope.open and scope is not self), self))
        for point in self.entries:
            point.hold()
        with counting:
            _open_scopes += 1
        return self.subject

    def __exit__(self, *exc: object) -> None:
        global _open_scopes
        if not self.open:
            return
        self.open = False
        for point in self.entries:
            point.release()
        # By identity, not by token: the block may end in another context than the one it began in.
        _scopes.set(tuple(scope for scope in _scopes.get() if scope is not self))
        with counting:
            _open_scopes -= 1


class Handle:
    """A hook that stays on the model, in every thread, until `remove()`; also usable as a `with` block."""

    def __init__(self, points: Sequence[HookPoint], fn: HookFn, backward: bool):
        self.points, self.open = tuple(points), True
        hook = _Hook(self, fn, backward=backward)
        for point in self.points:
            with counting:
                point.handles = (*point.handles, hook)
            point.hold()

    def remove(self) -> None:
        """Take the hook off; doing so twice is harmless."""
        if not self.open:
            return
        self.open = False
        for point in self.points:
            with counting:
                point.handles = tuple(hook for hook in point.handles if hook.owner is not self)
            point.release()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


class _Graph:
    """Owner of backward hooks that live as long as the graph they were bound to."""

    open = True


class moment:
    """While this block runs, hooks are told that the forward pass is `step`, from position `offset`, with `seen`."""

    def __init__(self, step: int, offset: int, seen: Tensor | None = None):
        self.value = (step, offset, seen)

    def __enter__(self) -> None:
        self.before = _moment.get()
        _moment.set(self.value)

    def __exit__(self, *exc: object) -> None:
        _moment.set(self.before)


def edited_elsewhere(points: Iterable[HookPoint]) -> bool:
    """Is any of these points listened to in this thread or task? Shortcuts that skip points fall back if so."""
    return any(point.listening() for point in points)


class HookedModule(nn.Module):
    """An nn.Module whose HookPoints are addressed by name."""

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
        return list(self._points)

    def resolve(self, where: Where) -> list[HookPoint]:
        """The points that a name, short site, list or predicate asks for; unknown ones raise with the nearest."""
        return [self._points[name] for name in resolve(where, self.hook_names())]

    def hooks(
        self, fwd_hooks: Iterable[tuple[Where, HookFn]] = (), bwd_hooks: Iterable[tuple[Where, HookFn]] = ()
    ) -> HookScope:
        """A `with` block inside which the hooks are active, in this thread or task only.

        A hook is `(act, hook) -> Tensor | None`; `act` is its own to edit, `None` leaves the activation unchanged.
        """
        scope = HookScope(self, {})
        self._attach(scope, fwd_hooks, scope, backward=False)
        self._attach(scope, bwd_hooks, scope, backward=True)
        return scope

    def _attach(self, scope: HookScope, hooks: Iterable[tuple[Where, HookFn]], owner, *, backward: bool) -> None:
        for pair in hooks:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[1]):
                raise WrongType(f"a hook is given as (where, function), for example (('z', 5), fn); got {pair!r}")
            for point in self.resolve(pair[0]):
                scope.entries.setdefault(point, []).append(_Hook(owner, pair[1], backward=backward))

    def add_hook(self, where: Where, fn: HookFn, *, dir: str = "fwd") -> Handle:
        """Attach a hook until its handle's `remove()`, in every thread. `dir` is "fwd" or "bwd"."""
        if dir not in ("fwd", "bwd"):
            raise InputError(f"dir must be 'fwd' or 'bwd', got {dir!r}")
        if not callable(fn):
            raise WrongType(f"a hook is a function (act, hook) -> Tensor | None, got {fn!r}")
        return Handle(self.resolve(where), fn, dir == "bwd")

    def reset_hooks(self) -> None:
        """Remove every hook that `add_hook` put on this model. Open `with` blocks keep theirs."""
        for point in self._points.values():
            for hook in point.handles:
                hook.owner.remove()

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Iterable[tuple[Where, HookFn]] = (),
        bwd_hooks: Iterable[tuple[Where, HookFn]] = (),
        **kwargs: Any,
    ) -> Any:
        """One forward pass with these hooks. Backward hooks live on in the graph of this call, and only there."""
        scope = self.hooks(fwd_hooks)
        self._attach(scope, bwd_hooks, _Graph(), backward=True)
        with scope:
            return self(*args, **kwargs)

    def capture(
        self, where: Where | None = None, *, device=None, dtype: torch.dtype | None = None, grads: bool = False
    ) -> tuple[HookScope, ActivationCache]:
        """A scope and the cache that it fills: what each named point held after all edits, one tensor once.

        `None` asks for every point except the lazy ones. A second forward pass inside the scope overwrites the first.
        """
        if grads and not torch.is_grad_enabled():
            raise InputError("grads=True needs gradients, which are switched off here; leave the torch.no_grad() block")
        chosen = self._plain_points() if where is None else self.resolve(where)
        entries = Entries()
        scope = HookScope(self, {})
        taker = _Capture(entries, device, dtype, grads, asked=where is not None)
        for point in chosen:
            scope.entries[point] = [_Hook(scope, None, capture=taker)]
        return scope, ActivationCache(entries, self)

    def _plain_points(self) -> list[HookPoint]:
        return [point for name, point in self.hook_points().items() if _site_name(name) not in LAZY]

    def run_with_cache(
        self,
        *args: Any,
        names: Where | None = None,
        device=None,
        dtype: torch.dtype | None = None,
        grads: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """The output, and what the named points held on the way.

        Entries are detached; with `grads=True` they stay in the graph and the caller's backward fills `<name>_grad`.
        """
        scope, cache = self.capture(names, device=device, dtype=dtype, grads=grads)
        with scope:
            output = self(*args, **kwargs)
        return output, cache


def _site_name(name: str) -> str:
    found = parse(name)
    if found is None:
        raise NameNotFound(f"{name!r} is not the name of a hook point")
    return found.name
