"""Linear layers, and a scope in which they run on weights packed for the CPU.

oneDNN keeps a weight in the order in which its kernels read it; on some CPUs that multiplies two to three times faster
than torch's default. Packing costs one pass over the weight, so it is done for a sweep, a generation or a `with` block,
and dropped at its end.
"""

import os
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from hooklens.core.errors import InputError
from hooklens.core.scope import Lifetime, Scope

# A weight in an order of oneDNN's own; its logical shape stays.
Packed = Float[Tensor, "d_out d_in"]
# A weight, the version of it that was packed, and its pack.
Known = tuple[Float[Tensor, "d_out d_in"], int, Packed]

_packs: ContextVar[tuple[Lifetime, ...]] = ContextVar("hooklens_packed", default=())
_open_packs: set[Lifetime] = set()
#: The setting that switches packed linears off for a process.
ENV = "HOOKLENS_PACKED_LINEARS"
# Packed for one row, a weight is laid out for a kernel that reads it a fifth slower than the one for 16 rows.
_FEWEST_ROWS = 16
# Numbers of a weight from which on the two kinds of plain product of one row are timed, and how many times faster than
# a row a vector was.
_WORTH_MEASURING = 2**20
_vector_gains: dict[tuple[torch.Size, torch.dtype], float] = {}


class Linear(nn.Linear):
    """nn.Linear, multiplied with packed weights inside a `packed_linears` scope and by torch everywhere else."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # drawing nothing on the meta device makes torch import its compiler, for a second
            super().reset_parameters()

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        if _open_packs and (packs := packed_linears.innermost()) is not None:
            packed = packs.weight_of(self, x)
            if packed is not None:
                return packed_product(x, packed, self.bias)
        return F.linear(x, self.weight, self.bias)


class packed_linears(Scope):
    """A `with` block in which no-grad float32 CPU linear layers use packed weights, where these measure faster.

    >>> layer = Linear(8, 8)
    >>> with torch.no_grad(), packed_linears():
    ...     torch.allclose(layer(torch.ones(2, 8)), F.linear(torch.ones(2, 8), layer.weight, layer.bias), atol=1e-4)
    True

    A weight is packed at its first use and packed again if it is edited inside the block (through `.data` torch keeps
    no account of edits: use no_grad). `rows` is the number of rows that most products will have. Inside another block
    that one decides, except where `enabled` says otherwise. The environment variable HOOKLENS_PACKED_LINEARS=0 switches
    packing off.
    """

    stack, anywhere = _packs, _open_packs

    def __init__(self, *, rows: int = 256, enabled: bool | None = None):
        super().__init__()
        self.rows, self.pinned = rows, enabled is not None
        self.enabled = packing_pays(rows) if enabled is None else enabled and packing_works()
        self.packs: dict[Linear, Known] = {}

    def begin(self) -> "_Packs":
        outer = self.innermost()
        own = outer is None or (self.pinned and outer.enabled != self.enabled)
        # Inside another scope its packs are used: nothing is packed twice.
        return _Packs(self.rows, self.enabled, self.packs) if own else outer

    def end(self) -> None:
        super().end()
        self.packs.clear()


class _Packs:
    """The weights that a scope has packed."""

    def __init__(self, rows: int, enabled: bool, packs: "dict[Linear, Known]"):
        self.rows, self.enabled, self.packs = rows, enabled, packs

    def weight_of(self, layer: Linear, x: Float[Tensor, "... d_in"]) -> Packed | None:
        """The packed weight for this product, or None where torch's own path must run."""
        weight = layer.weight
        if not self.enabled or x.dtype != torch.float32 or weight.dtype != torch.float32 or weight.device.type != "cpu":
            return None
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return None
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        if wrapped(x) or wrapped(weight) or weight.is_inference():  # these tell no version, or no address
            return None
        known = self.packs.get(layer)
        if known is None or known[0].data_ptr() != weight.data_ptr() or known[1] != weight._version:
            # The weight is kept beside its pack: a freed one's address might come back as that of another.
            known = self.packs[layer] = (weight.detach(), weight._version, pack(weight, self.rows))
        return known[2]


def pack(weight: Float[Tensor, "d_out d_in"], rows: int) -> Packed:
    """A copy of the weight in the order in which oneDNN reads it for products of about that many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), max(rows, _FEWEST_ROWS))


def packed_product(
    x: Float[Tensor, "... d_in"], packed: Packed, bias: Float[Tensor, "d_out"] | None
) -> Float[Tensor, "... d_out"]:
    """x times a packed weight, plus the bias."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Is the layer an nn.Linear and nothing more, so that its weight says all (LoRA and torch hooks say more)?"""
    return type(linear) in (Linear, nn.Linear) and not (linear._forward_hooks or linear._forward_pre_hooks)


def matrix_of(linear: nn.Module, d_in: int) -> Float[Tensor, "d_out d_in"]:
    """What the layer multiplies by: its weight, or where it is wrapped (LoRA) what calls of it show.

    A wrapped layer is called on the unit vectors, and once more to see that it is linear: dropout that is on, or a
    torch hook that tells positions apart, raises.

    >>> layer = Linear(2, 3)
    >>> matrix_of(layer, 2) is layer.weight
    True
    """
    if is_plain(linear):
        return linear.weight
    like = next(p for p in linear.parameters() if p.is_floating_point())
    matrix = without_bias(linear, torch.eye(d_in, dtype=like.dtype, device=like.device)[None])[0].mT
    probe = torch.linspace(-1, 1, 3 * d_in, dtype=like.dtype, device=like.device).view(1, 3, d_in)
    found, expected = without_bias(linear, probe), F.linear(probe, matrix)
    if not bool((found - expected).abs().max() <= torch.finfo(like.dtype).eps ** 0.5 * found.abs().max()):
        raise InputError(
            f"this method needs the matrix of a {type(linear).__name__}, which is no linear map as it stands: call "
            "model.eval(), remove torch hooks that edit it, or merge the adapter into the weight"
        )
    return matrix


def without_bias(linear: nn.Module, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
    """x times what the layer multiplies by, also where it is wrapped: linear(x) - linear(0).

    >>> layer = Linear(2, 3)
    >>> torch.allclose(without_bias(nn.Sequential(layer), torch.ones(4, 2)), torch.ones(4, 2) @ layer.weight.T)
    True

    A bias of -inf, which forbids a token, is called as 0: it would leave nothing of the product.
    """
    if is_plain(linear):
        return F.linear(x, linear.weight)
    vectors = {name: p for name, p in linear.named_parameters() if p.ndim == 1}
    finite = {name: p.masked_fill(p.isinf(), 0.0) for name, p in vectors.items() if bool(p.isinf().any())}
    if finite:
        return functional_call(linear, finite, (x,)) - functional_call(linear, finite, (torch.zeros_like(x),))
    return linear(x) - linear(torch.zeros_like(x))


def kernel_of(model: nn.Module) -> str:
    """Which products the model's linear layers run on here, without gradients: "packed" weights or torch's "linear".

    The two differ in the last bits, so a result says which it came from.

    >>> layer = Linear(8, 8)
    >>> with packed_linears(enabled=False):
    ...     kernel_of(layer)
    'linear'
    """
    scope = packed_linears.innermost()
    fits = any(w.dtype == torch.float32 and w.device.type == "cpu" for w in model.parameters())
    return "packed" if scope is not None and scope.enabled and fits else "linear"


def packing_works() -> bool:
    """Are the operators there, not switched off, and right? They are private to torch, so this is looked at first."""
    return os.environ.get(ENV, "1") != "0" and _measured()[0]


def packing_wanted(rows: int) -> bool:
    """Should products of that many rows be packed here? An open scope has decided; else whether it pays does."""
    packs = packed_linears.innermost()
    return packing_pays(rows) if packs is None else packs.enabled


def packing_pays(rows: int = 240) -> bool:
    """Do packed products of that many rows beat torch's own on this machine? Measured once a process."""
    return os.environ.get(ENV, "1") != "0" and packing_gain(rows) > 1.1


def packing_gain(rows: int = 240) -> float:
    """How many times faster a packed product is than torch's own here; 0 where packing does not work.

    240 rows, in about 30 ms. For a few rows one is measured, in 0.3 s: their time goes into reading the weight, so it
    must be one that no cache holds.
    """
    return (_measured() if rows > 16 else _measured(1, 16384))[1]


def vector_pays(weight: Float[Tensor, "d_out d_in"]) -> bool:
    """Is a weight times a vector about as fast as times one row here, or faster? Measured once a process for a shape.

    Both read the weight once; BLAS has a routine for each, and which is the better one differs from machine to machine.
    """
    if weight.numel() < _WORTH_MEASURING:
        return True
    key, weight = (weight.shape, weight.dtype), weight.detach()
    if key not in _vector_gains:
        x = weight.new_ones(1, weight.shape[1])
        row, vector = _seconds(lambda: torch.mm(x, weight.t()), 3), _seconds(lambda: torch.mv(weight, x[0]), 3)
        _vector_gains[key] = row / vector
    return _vector_gains[key] > 0.8


@cache
def _measured(rows: int = 240, d_out: int = 768) -> tuple[bool, float]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False, 0.0
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 768, generator=generator) for size in (rows, d_out))
    try:
        with torch.no_grad():
            packed = pack(weight, rows)

            def ours() -> Tensor:
                return packed_product(x, packed, None)

            def theirs() -> Tensor:
                return F.linear(x, weight)

            if not torch.allclose(ours(), theirs(), atol=1e-3, rtol=1e-4):
                return False, 0.0
            return True, _seconds(theirs) / _seconds(ours)
    except (RuntimeError, AttributeError, TypeError):
        return False, 0.0  # another torch, another signature: torch's own path is always there


def _seconds(work: Callable[[], Tensor], tries: int = 9) -> float:
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)  # the least disturbed run: other work on the machine only ever adds
