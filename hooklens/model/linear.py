"""Linear layers, and a scope in which they use weights packed for the CPU.

oneDNN can store a weight in the order in which its kernels read it; on some CPUs products are then two to three times
faster than torch's default. Packing costs one pass over the weight, so packs last for a sweep, a generation or a `with`
block.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F

from hooklens.core.errors import InputError
from hooklens.core.scope import Lifetime, Scope

# A weight in oneDNN's internal order; its logical shape is unchanged.
Packed = Float[Tensor, "d_out d_in"]
# A weight, the version of it that was packed, and its pack.
Known = tuple[Float[Tensor, "d_out d_in"], int, Packed]
# An embedding, tokens, and the gradient of their rows.
Collected = tuple[nn.Parameter, Int[Tensor, "*tokens"], Float[Tensor, "*tokens d_model"]]

_packs: ContextVar[tuple[Lifetime, ...]] = ContextVar("hooklens_packed", default=())
_open_packs: set[Lifetime] = set()
#: The environment variable that disables packed linears for a process.
ENV = "HOOKLENS_PACKED_LINEARS"
# A weight packed for one row gets the layout of a kernel that is a fifth slower than the one for 16 rows.
_FEWEST_ROWS = 16
# The size of a weight from which the two plain products of one row are timed, and the speed of a vector over a row.
_WORTH_MEASURING = 2**19
# The least multiplications for which a product in a step of training goes to oneDNN: below, the call costs more.
_WORTH_ONEDNN = 2**26
_gradients: ContextVar[tuple[Lifetime, ...]] = ContextVar("hooklens_gradients", default=())
_open_gradients: set[Lifetime] = set()
_vector_gains: dict[tuple[torch.Size, torch.dtype], float] = {}


class Linear(nn.Linear):
    """nn.Linear that uses packed weights inside a `packed_linears` scope and torch's product otherwise."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # on the meta device torch would import its compiler, which takes a second
            super().reset_parameters()

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        if _open_packs and (packs := packed_linears.innermost()) is not None:
            packed = packs.weight_of(self, x)
            if packed is not None:
                return packed_product(x, packed, self.bias)
        into = gradients_into.innermost() if _open_gradients else None
        if into is not None and into.products and _worth_it(x, self.weight):
            return _Product.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class packed_linears(Scope):
    """A `with` block in which no-grad float32 CPU linear layers use packed weights if these are measured to be faster.

    >>> layer = Linear(8, 8)
    >>> with torch.no_grad(), packed_linears():
    ...     torch.allclose(layer(torch.ones(2, 8)), F.linear(torch.ones(2, 8), layer.weight, layer.bias), atol=1e-4)
    True

    A weight is packed at its first use, and packed again if it is edited inside the block (torch does not track edits
    through `.data`: use no_grad). `rows` is the typical number of rows of the products. Inside another block the outer
    one decides, unless `enabled` is set. The environment variable HOOKLENS_PACKED_LINEARS=0 disables packing.
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
        # Inside another scope, its packs are used, so that nothing is packed twice.
        return _Packs(self.rows, self.enabled, self.packs) if own else outer

    def end(self) -> None:
        super().end()
        self.packs.clear()


@dataclass
class _Packs:
    """The weights that a scope has packed."""

    rows: int
    enabled: bool
    packs: "dict[Linear, Known]"

    def weight_of(self, layer: Linear, x: Float[Tensor, "... d_in"]) -> Packed | None:
        """The packed weight for this product, or None if torch's own path must run."""
        weight = layer.weight
        if not self.enabled or x.dtype != torch.float32 or weight.dtype != torch.float32 or weight.device.type != "cpu":
            return None
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return None
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        if wrapped(x) or wrapped(weight) or weight.is_inference():  # these have no version, or no address
            return None
        known = self.packs.get(layer)
        if known is None or known[0].data_ptr() != weight.data_ptr() or known[1] != weight._version:
            # The weight is kept with its pack: a freed weight's address might be reused by another.
            known = self.packs[layer] = (weight.detach(), weight._version, pack(weight, self.rows))
        return known[2]


def pack(weight: Float[Tensor, "d_out d_in"], rows: int) -> Packed:
    """A copy of the weight in the order in which oneDNN reads it for products of about this many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), max(rows, _FEWEST_ROWS))


def packed_product(
    x: Float[Tensor, "... d_in"], packed: Packed, bias: Float[Tensor, "d_out"] | None
) -> Float[Tensor, "... d_out"]:
    """x times a packed weight, plus the bias."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class GradientVector:
    """Where the passes of a step of training write gradients; `of` maps the id of a weight to its part of a vector.

    With `products`, large float32 products on the CPU, and their gradients, are computed by oneDNN from the weight as
    it lies in memory, so that nothing has to be packed after each change of the weights. With `rows`, gradients of
    embedded tokens are kept until `add_rows`: autograd would write one of the whole vocabulary for every pass.
    """

    def __init__(self, of: Mapping[int, Float[Tensor, "..."]], *, products: bool = True, rows: bool = True):
        self.of, self.collects_rows = of, rows
        self.products = products and _measured(packs=False) > 0
        self.written: set[int] = set()
        self.rows: list[Collected] = []

    def add(
        self, weight: Float[Tensor, "d_out d_in"], grad: Float[Tensor, "row d_out"], x: Float[Tensor, "row d_in"]
    ) -> Float[Tensor, "d_out d_in"] | None:
        """Add a product's gradient to the vector; returned instead if the weight has no part there."""
        part = self.of.get(id(weight))
        if part is None:
            return grad.T @ x
        if id(weight) in self.written:
            part.addmm_(grad.T, x)
        else:
            torch.mm(grad.T, x, out=part)
            self.written.add(id(weight))
        return None

    def add_rows(self) -> None:
        """Add the kept gradients of tokens to their rows: in the vector if a product wrote to it, else in `grad`."""
        for weight, tokens, grad in self.rows:
            if id(weight) in self.written:
                total = self.of[id(weight)]
            else:
                weight.grad = total = torch.zeros_like(weight) if weight.grad is None else weight.grad
            total.index_add_(0, tokens.flatten(), grad.flatten(0, -2))
        self.rows.clear()


class gradients_into(Scope):
    """A `with` block whose backward passes write gradients of weights to a vector, where it has a part of them.

    >>> layer, x, into = Linear(8, 8), torch.ones(2, 8), GradientVector({})
    >>> with gradients_into(into):
    ...     torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5)
    True

    Such gradients cannot be differentiated again.
    """

    stack, anywhere = _gradients, _open_gradients

    def __init__(self, into: GradientVector):
        super().__init__()
        self.into = into

    def begin(self) -> GradientVector:
        return self.into


class _Product(torch.autograd.Function):
    """x times a weight, plus a bias. The gradient of the weight is torch's own product, which is as fast."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, "d_out"] | None
    ) -> Float[Tensor, "... d_out"]:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.into = weight, gradients_into.innermost()
        return packed_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Float[Tensor, "... d_out"]
    ) -> tuple[Float[Tensor, "... d_in"] | None, Float[Tensor, "d_out d_in"] | None, Float[Tensor, "d_out"] | None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            packed_product(grad, weight.T, None) if of_x else None,
            ctx.into.add(ctx.weight, rows, x.flatten(0, -2)) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def has_gradient_hooks(weight: Float[Tensor, "..."]) -> bool:
    """Whether hooks on the weight's gradient expect that autograd computes it.

    >>> weight = nn.Parameter(torch.ones(2, 2))
    >>> handle = weight.register_hook(lambda grad: grad * 0)
    >>> has_gradient_hooks(weight), has_gradient_hooks(nn.Parameter(torch.ones(2, 2)))
    (True, False)
    """
    return bool(weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None))


def _worth_it(x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"]) -> bool:
    """Whether a product of a step of training is large enough, and one that oneDNN computes."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu" or not x.numel():
        return False
    if has_gradient_hooks(weight):
        return False
    return x.numel() * len(weight) >= _WORTH_ONEDNN and x.ndim > 1 and not torch.is_autocast_enabled("cpu")


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the layer is a plain nn.Linear, fully described by its weight and bias (no LoRA, no torch hooks)."""
    return type(linear) in (Linear, nn.Linear) and not (linear._forward_hooks or linear._forward_pre_hooks)


def matrix_of(linear: nn.Module, d_in: int) -> Float[Tensor, "d_out d_in"]:
    """The matrix that the layer multiplies by: its weight, or, if it is wrapped (LoRA), the result of calling it.

    A wrapped layer is called on the unit vectors, and again to check that it is linear: active dropout, or a torch hook
    that treats positions differently, raises an error.

    >>> layer = Linear(2, 3)
    >>> matrix_of(layer, 2) is layer.weight
    True
    """
    if is_plain(linear):
        return linear.weight
    like = next(p for p in linear.parameters() if p.is_floating_point())
    matrix = without_bias(linear, torch.eye(d_in, dtype=like.dtype, device=like.device)[None])[0].mT
    probe = torch.linspace(-1, 1, 3 * d_in, dtype=like.dtype, device=like.device).view(1, 3, d_in)
    computed, expected = without_bias(linear, probe), F.linear(probe, matrix)
    if not bool((computed - expected).abs().max() <= torch.finfo(like.dtype).eps ** 0.5 * computed.abs().max()):
        raise InputError(
            f"this method needs the matrix of a {type(linear).__name__}, which is not a linear map in its current "
            "state: call model.eval(), remove torch hooks that edit it, or merge the adapter into the weight"
        )
    return matrix


def without_bias(linear: nn.Module, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
    """x times the layer's matrix, even if the layer is wrapped: linear(x) - linear(0).

    >>> layer = Linear(2, 3)
    >>> torch.allclose(without_bias(nn.Sequential(layer), torch.ones(4, 2)), torch.ones(4, 2) @ layer.weight.T)
    True

    A bias of -inf, which forbids a token, is treated as 0: otherwise the product would be lost.
    """
    if is_plain(linear):
        return F.linear(x, linear.weight)
    vectors = {name: p for name, p in linear.named_parameters() if p.ndim == 1}
    finite = {name: p.masked_fill(p.isinf(), 0.0) for name, p in vectors.items() if bool(p.isinf().any())}
    if finite:
        return functional_call(linear, finite, (x,)) - functional_call(linear, finite, (torch.zeros_like(x),))
    return linear(x) - linear(torch.zeros_like(x))


def kernel_of(model: nn.Module) -> str:
    """The products that the model's linear layers use here, without gradients: "packed" or torch's "linear".

    The two differ in the last bits, so every result states which one was used.

    >>> layer = Linear(8, 8)
    >>> with packed_linears(enabled=False):
    ...     kernel_of(layer)
    'linear'
    """
    scope = packed_linears.innermost()
    fits = any(w.dtype == torch.float32 and w.device.type == "cpu" for w in model.parameters())
    return "packed" if scope is not None and scope.enabled and fits else "linear"


def packing_works() -> bool:
    """Whether the operators exist, are enabled, and compute correctly. They are private to torch, hence this check."""
    return packing_gain() > 0


def packing_wanted(rows: int) -> bool:
    """Whether products with this many rows should be packed here: an open scope decides, else whether it pays."""
    packs = packed_linears.innermost()
    return packing_pays(rows) if packs is None else packs.enabled


def packing_pays(rows: int = 240) -> bool:
    """Whether packed products with this many rows are faster than torch's own on this machine; measured once."""
    return packing_gain(rows) > 1.1


def packing_gain(rows: int = 240) -> float:
    """How many times faster a packed product is than torch's own on this machine; 0 if packing fails or is disabled.

    Takes about 30 ms for 240 rows. A few rows take 0.3 s: their time is spent reading the weight, so the weight must be
    larger than any cache.
    """
    if os.environ.get(ENV, "1") == "0":
        return 0.0
    return _measured() if rows > 16 else _measured(1, 16384)


def faster_gradients_pay() -> bool:
    """Whether oneDNN multiplies by a weight as it lies in memory faster than torch does here; measured once."""
    return os.environ.get(ENV, "1") != "0" and _measured(packs=False) > 1


def vector_pays(weights: Sequence[Float[Tensor, "d_out d_in"]]) -> bool:
    """Whether weights of one shape times a vector take no longer than times one row here; measured once per shape.

    Both read a weight once; BLAS has a routine for each, and the faster one differs between machines and shapes. Up to
    eight weights take turns, as in a generation, which finds none of them in the core's cache.
    """
    first = weights[0]
    if first.numel() < _WORTH_MEASURING:
        return True
    key = (first.shape, first.dtype)
    if key not in _vector_gains:
        some, x = [weight.detach() for weight in weights[:8]], first.new_ones(1, first.shape[1]).detach()
        row = _seconds(lambda: [torch.mm(x, weight.t()) for weight in some], 5)
        vector = _seconds(lambda: [torch.mv(weight, x[0]) for weight in some], 5)
        _vector_gains[key] = row / vector
    return _vector_gains[key] > 0.95


@cache
def _measured(rows: int = 240, d_out: int = 768, packs: bool = True) -> float:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return 0.0
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 768, generator=generator) for size in (rows, d_out))
    try:
        with torch.no_grad():
            known = pack(weight, rows) if packs else weight
            ours, theirs = partial(packed_product, x, known, None), partial(F.linear, x, weight)
            if not torch.allclose(ours(), theirs(), atol=1e-3, rtol=1e-4):
                return 0.0
            return _seconds(theirs) / _seconds(ours)
    except (RuntimeError, AttributeError, TypeError):
        return 0.0  # the signature differs between versions of torch: fall back to torch's own path


def _seconds(work: Callable[[], object], tries: int = 9) -> float:
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)  # the least disturbed run: other work on the machine only adds time
