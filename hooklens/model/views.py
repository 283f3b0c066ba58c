"""The weights of all layers in one tensor: a copy to read, whose writes by layer reach the model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hooklens.core.errors import InputError

_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")}


class StackedWeight(Tensor):
    """`model.W_Q`: the layers' weights, stacked. `model.W_Q[5]` is the layer's own; results are plain tensors."""

    views: Sequence[Tensor]

    @classmethod
    def of(cls, views: Sequence[Tensor]) -> "StackedWeight":
        """The stack of the layers' own views."""
        stacked = torch.stack(list(views)).as_subclass(cls)
        stacked.views = views
        return stacked

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "retain_grad_")
        target = (kwargs or {}).get("out", args[0] if in_place or name in _IN_PLACE else None)
        if isinstance(target, cls):
            raise InputError(
                f"{name} on a stacked weight would change this copy, not the model; write by layer "
                "(model.W_Q[5, 3] = value), assign the whole (model.W_Q = value), or edit model.blocks[5].attn.W_Q"
            )
        plain = [a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args] if name != "as_subclass" else args
        with torch._C.DisableTorchFunctionSubclass():
            return func(*plain, **(kwargs or {}))

    def __getitem__(self, index: Any) -> Any:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, bool) or not isinstance(first, int):
            return self.as_subclass(Tensor)[index]
        return self.views[first][tuple(rest)]  # not of the copy: an in-place write to it must count

    def __setitem__(self, index: Any, value: Any) -> None:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, bool) or not isinstance(first, int):
            raise InputError(
                f"a stacked weight is written one layer at a time, model.W_Q[5, 3] = value, got the index {index!r}"
            )
        with torch.no_grad():
            self.views[first][tuple(rest)] = value
            # Through .data: a change that autograd counts makes it replay as_subclass here, without end.
            self.as_subclass(Tensor).data[first] = self.views[first]


def write_all(views: Sequence[Tensor], value: Tensor) -> None:
    """Assign a stacked tensor to the layers' own weights."""
    expected = (len(views), *views[0].shape)
    if tuple(value.shape) != expected:
        raise InputError(f"a stacked weight of shape {list(expected)} was assigned one of shape {list(value.shape)}")
    with torch.no_grad():
        for view, layer in zip(views, value, strict=True):
            view.copy_(layer)
