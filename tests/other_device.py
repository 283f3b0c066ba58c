"""A second device for a machine that has only a CPU: it refuses what a GPU refuses, and computes on the CPU.

>>> with other_device() as device:
...     x = torch.ones(2, device=device)
...     print((x + x).device, (x + x).cpu())
lazy:0 tensor([2., 2.])
>>> with other_device():
...     x + torch.ones(2)
Traceback (most recent call last):
RuntimeError: Expected all tensors to be on the same device, but aten.add.Tensor got some on lazy:0 and some on cpu

It sees operations on tensors, one by one. It does not see what lies below them: the limits of a GPU's kernels (dtypes,
sizes, determinism), its rounding, its memory, its streams and errors that come late; nor code that asks for the type
"cuda". Operators that torch takes apart before they arrive here are checked part by part, so that the CPU tensors
which only a fused kernel refuses pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# A type of device that this torch knows, that needs no driver and for which autograd starts no thread.
OTHER = torch.device("lazy", 0)
aten = torch.ops.aten
_COPIES = (aten._to_copy, aten.to, aten.type_as)
_INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
# Not even a single number of the CPU may be joined with tensors of another device.
_JOINS = (aten.cat, aten.stack)


class Elsewhere(Tensor):
    """A tensor of the other device. Its numbers are in `held`, of the CPU."""

    held: Tensor
    # Results are already of the kind that __torch_dispatch__ made; the default would make all of them this kind.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        with torch.inference_mode(held.is_inference()):  # a view of a tensor from outside of such a block is none of it
            out = Tensor._make_wrapper_subclass(cls, held.shape, device=OTHER, **like)
        out.held = held
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _call(func, args, kwargs or {})

    def untyped_storage(self) -> Any:  # asked for where memory is counted, and to see which tensors share it
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def as_subclass(self, cls: type) -> Tensor:
        """A tensor that is of both classes: torch's own as_subclass makes one of `cls` alone, without the numbers."""
        kind = Elsewhere if issubclass(Elsewhere, cls) else type(cls.__name__, (cls, Elsewhere), {})
        return _As.apply(self, kind)

    def __format__(self, spec: str) -> str:
        return format(self.held, spec)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.held!r} on {OTHER}"


class _As(torch.autograd.Function):
    """A view of another class, through which gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: Elsewhere, kind: type[Elsewhere]) -> Tensor:
        return kind(x.held)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Operations(TorchDispatchMode):
    """Takes what makes tensors with `device=`, and copies to the other device, neither of which gets one of there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _call(func, args, kwargs or {})


@contextmanager
def other_device() -> Iterator[torch.device]:
    before = torch._C._only_lift_cpu_tensors()
    # torch.tensor and the like write numbers without an operation: here first on the CPU, then they are moved.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Operations():
            yield OTHER
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def _call(func: Any, args: tuple, kwargs: dict) -> Any:
    """What an operation gives, computed on the CPU."""
    given: list[Any] = []
    held_args, held_kwargs = _here(args, given), {name: _here(value, given) for name, value in kwargs.items()}
    asked = [x.type for x in given if isinstance(x, torch.device)]
    of_here = {id(x.held): x for x in given if isinstance(x, Elsewhere)}
    there = OTHER.type in asked if asked else bool(of_here)
    if func.overloadpacket is aten.copy_:
        there = isinstance(args[0], Elsewhere)
    elif func.overloadpacket not in _COPIES and of_here:
        _check_devices(func, args, given)
    if there and any(isinstance(x, torch.Generator) for x in given):
        raise RuntimeError(f"Expected a '{OTHER.type}' device type for generator but found 'cpu'")
    out = func(*held_args, **held_kwargs)
    if there and torch.Tag.inplace_view in func.tags:
        args[0].data = Elsewhere(out)  # such as squeeze_: the shape is now that of `held`
    if func.overloadpacket in _COPIES and there != isinstance(args[0], Elsewhere):
        out = out.clone()  # two devices share no memory
    return _there(out, of_here) if there else out


def _here(x: Any, given: list[Any]) -> Any:
    """The argument as the CPU takes it; tensors, devices and generators are added to the list of those `given`."""
    if isinstance(x, tuple | list):
        return type(x)(_here(one, given) for one in x)
    if isinstance(x, Tensor | torch.device | torch.Generator):
        given.append(x)
    if isinstance(x, Elsewhere):
        return x.held
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _there(x: Any, known: dict[int, Tensor]) -> Any:
    """The result as the other device gives it; what was changed in place is the tensor that was given."""
    if isinstance(x, tuple | list):
        return tuple(_there(one, known) for one in x)
    if id(x) in known:
        return known[id(x)]
    return Elsewhere(x) if isinstance(x, Tensor) else x


def _check_devices(func: Any, args: tuple, given: list[Any]) -> None:
    """Raise where torch would: for tensors of both devices, but for single numbers of the CPU and its indices."""
    if func.overloadpacket in _INDEXING and isinstance(args[0], Elsewhere):
        given = [args[0], *args[2:3]]
    least = 0 if func.overloadpacket in _JOINS else 1
    here = [x for x in given if isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.ndim >= least]
    if here and any(isinstance(x, Elsewhere) for x in given):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got some on {OTHER} and some on cpu"
        )
