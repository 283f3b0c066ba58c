"""The weights of all layers in one tensor: a copy for reading, with writes by layer that reach the model."""

from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from hooklens.core.errors import InputError, OutOfRange

_is_alias_of = vars(torch._C)["_is_alias_of"]  # missing in torch's type stubs
_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")}


class ReadOnlyView(Tensor):
    """Part of a copy of weights. Writing into it would have no effect, so it raises. Computed results are plain."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        in_place = name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "retain_grad_")
        writes = in_place or name in _IN_PLACE or name == "__setitem__"
        first = next(iter((*args, *kwargs.values())), None)  # torch.nn.init names its argument
        if isinstance(kwargs.get("out", first if writes else None), ReadOnlyView):
            raise InputError(
                f"{name} on a stacked weight would change this copy, not the model; write by layer "
                "(model.W_Q[5, 3] = value), assign the whole (model.W_Q = value), edit model.blocks[5].attn.W_Q, or "
                "clone() it to have a copy of your own"
            )
        if name == "as_subclass":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        plain = [a.as_subclass(Tensor) if isinstance(a, ReadOnlyView) else a for a in args]
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return _guarded(func(*plain, **kwargs), [p for p, a in zip(plain, args, strict=True) if p is not a])
        except IndexError as error:
            if name != "__getitem__":
                raise
            raise _outside(args[0], args[1], error) from error


class StackedWeight(ReadOnlyView):
    """`model.W_Q`: the layers' weights, stacked. `model.W_Q[5]`, or an element of a loop, is the layer's own weight."""

    views: Sequence[Tensor]

    @classmethod
    def of(cls, views: Sequence[Tensor]) -> "StackedWeight":
        """Stack the layers' own views."""
        stacked = torch.stack(list(views)).as_subclass(cls)
        stacked.views = views
        return stacked

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> Any:
        named = getattr(func, "__name__", "") == "unbind" and isinstance(args[0], cls)
        if named and (*args[1:], *(kwargs or {}).values(), 0)[0] in (0, -args[0].ndim):
            return tuple(args[0].views)
        return super().__torch_function__(func, types, args, kwargs)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.views)

    def __getitem__(self, index: Any) -> Any:
        first, *rest = index if isinstance(index, tuple) else (index,)
        try:
            if not _is_number(first):
                copy = self.as_subclass(Tensor)
                return _guarded(copy[index], (copy,))
            return self._own(first)[tuple(rest)]  # not of the copy: an in-place write must reach the model
        except IndexError as error:
            raise _outside(self, index, error) from error

    def __setitem__(self, index: Any, value: Any) -> None:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if not _is_number(first):
            raise InputError(
                f"a stacked weight is written one layer at a time, model.W_Q[5, 3] = value, got the index {index!r}"
            )
        with torch.no_grad():
            try:
                self._own(first)[tuple(rest)] = value
            except IndexError as error:
                raise _outside(self, index, error) from error
            # Through .data: a change tracked by autograd would replay as_subclass here, without end.
            self.as_subclass(Tensor).data[first] = self.views[first]

    def _own(self, layer: int) -> Tensor:
        n = len(self.views)
        if not -n <= layer < n:
            raise InputError(
                f"layer {layer} of a stacked weight asked for; there are layers 0 to {n - 1} (or -{n} to -1)"
            )
        return self.views[layer]


class KVHeadWeight(Tensor):
    """A layer's own W_K, W_V, b_K or b_V: a view for reading and writing, whose parts are plain tensors."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, tuple) and not index:
            return self
        try:
            return self.as_subclass(Tensor)[index]
        except IndexError as error:
            raise _outside(self, index, error) from error

    def __setitem__(self, index: Any, value: Any) -> None:
        try:
            self.as_subclass(Tensor)[index] = value
        except IndexError as error:
            raise _outside(self, index, error) from error

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _outside(weight: Tensor, index: Any, error: IndexError) -> OutOfRange:
    return OutOfRange(
        f"the index {index!r} does not fit a weight of shape {list(weight.shape)} ({error}); keys and values have one "
        "entry per key/value head, which several query heads can share: query head h reads entry "
        "h // (cfg.n_heads // cfg.n_key_value_heads), and QK and OV have one entry per query head"
    )


def _is_number(index: Any) -> bool:
    return isinstance(index, SupportsIndex) and not isinstance(index, bool | Tensor)


def _guarded(out: Any, copies: Sequence[Tensor]) -> Any:
    """Results that share memory with a copy become read-only views, also in a tuple; all others are unchanged."""
    if torch.compiler.is_compiling():  # the compiler cannot trace this
        return out
    if type(out) in (tuple, list):
        return type(out)(_guarded(part, copies) for part in out)
    if isinstance(out, Tensor) and any(_is_alias_of(out, copy) for copy in copies):
        return out.as_subclass(ReadOnlyView)
    return out


def write_all(views: Sequence[Tensor], value: Tensor) -> None:
    """Assign a stacked tensor to the layers' own weights."""
    expected = (len(views), *views[0].shape)
    if tuple(value.shape) != expected:
        raise InputError(f"a stacked weight of shape {list(expected)} cannot be assigned shape {list(value.shape)}")
    with torch.no_grad():
        for view, layer in zip(views, value, strict=True):
            view.copy_(layer)
