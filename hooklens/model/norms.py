"""LayerNorm and RMSNorm: written out if a hook needs the intermediate values, torch's fused kernel otherwise."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hooklens.core.errors import InputError
from hooklens.core.hooks import HookedPart, HookPoint
from hooklens.core.precision import widened
from hooklens.model.config import LayerNormPart, NormPart, RMSNormPart

Vector = Float[Tensor, "*lead width"]
Scale = Float[Tensor, "*lead 1"]


class Norm(HookedPart, ABC):
    """normalized = centred(x) / scale, then weight and bias. Subclasses define the centring and the scale.

    The points can be read next to torch's fused kernel; only an edit or a gradient there disables it.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    unit_weight = 1.0  # the stored weight that means a factor of 1

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width, self.eps = width, eps
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()
        self.weight = self.bias = None

    def forward(self, x: Vector) -> Vector:
        if not (self.hook_scale.listening() or self.hook_normalized.listening()):
            return self.fused(x)
        wide = widened(x)
        centred = self.centred(wide)
        scale = self.rms(centred).to(x.dtype)
        scale_used = self.hook_scale(scale)
        normalized = (centred / scale_used).to(x.dtype)
        used = self.hook_normalized(normalized)
        if scale_used is scale and used is normalized:
            return self.fused(x)
        return self.affine(used)

    def rms(self, centred: Vector) -> Scale:
        return (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def centred(self, x: Vector) -> Vector:
        return x

    def gain(self) -> Float[Tensor, "width"] | None:
        """The factor of the normalised vector."""
        return self.weight

    def affine(self, normalized: Vector) -> Vector:
        gain = self.gain()
        out = normalized if gain is None else normalized * gain
        return out if self.bias is None else out + self.bias

    @abstractmethod
    def fused(self, x: Vector) -> Vector:
        """The whole norm in one kernel, if nothing needs the intermediate values."""

    def linearised(
        self, stack: Float[Tensor, "*lead width"], scale: Float[Tensor, "*scales 1"]
    ) -> Float[Tensor, "... width"]:
        """The norm with its scale frozen and without its bias: linear in the stack."""
        gain = self.gain()
        out = self.centred(stack) / scale
        return out if gain is None else out * gain.detach().to(out)


class LayerNorm(Norm):
    """Subtract the mean, divide by the standard deviation (Ba et al. 2016, equation 4).

    >>> LayerNorm(4, LayerNormPart(eps=0.0))(torch.tensor([[1.0, 1.0, 3.0, 3.0]])).round(decimals=4).tolist()
    [[-1.0, -1.0, 1.0, 1.0]]
    """

    def __init__(self, width: int, part: LayerNormPart):
        super().__init__(width, part.eps)
        self.weight = nn.Parameter(torch.ones(width)) if part.affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if part.affine and part.bias else None

    def centred(self, x: Vector) -> Vector:
        return x - x.mean(-1, keepdim=True)

    def fused(self, x: Vector) -> Vector:
        return F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)


class RMSNorm(Norm):
    """Divide by the root mean square (Zhang and Sennrich 2019, equation 4).

    >>> RMSNorm(2, RMSNormPart(eps=0.0))(torch.tensor([[3.0, 3.0]])).tolist()
    [[1.0, 1.0]]
    """

    def __init__(self, width: int, part: RMSNormPart):
        super().__init__(width, part.eps)
        self.offset, self.unit_weight = part.weight_offset, 1.0 - part.weight_offset
        self.weight = nn.Parameter(torch.full((width,), self.unit_weight)) if part.affine else None

    def gain(self) -> Float[Tensor, "width"] | None:
        if self.weight is None or not self.offset:
            return self.weight
        return widened(self.weight) + self.offset

    def affine(self, normalized: Vector) -> Vector:
        gain = self.gain()
        return normalized if gain is None else (normalized * gain).to(normalized.dtype)

    def fused(self, x: Vector) -> Vector:
        wide = widened(x)
        if wide is x and not self.offset:  # no intermediate rounding: torch's kernel gives the same bits
            return F.rms_norm(x, (self.width,), self.weight, self.eps)
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        gain = self.gain()
        if gain is None:
            return scaled.to(x.dtype)
        # Llama rounds before the weight, Gemma (whose weight is an offset) after it.
        return (scaled * gain).to(x.dtype) if self.offset else scaled.to(x.dtype) * gain


class Passage(NamedTuple):
    """The map between a part of a block and the residual stream: a norm, a factor, or the identity.

    With its scale frozen at the value of a run it is linear, so it can be applied to components and directions.
    """

    norm: Norm | None = None
    factor: float = 1.0

    def __call__(self, x: Vector) -> Vector:
        """Apply the map, with the hook points of the norm."""
        return self._times(x if self.norm is None else self.norm(x))

    def without_hooks(self, x: Vector) -> Vector:
        """Apply the map, without the hook points of the norm."""
        return self._times(x if self.norm is None else self.norm.fused(x))

    @property
    def open(self) -> bool:
        """Whether this is the identity."""
        return self.norm is None and self.factor == 1.0

    @property
    def scales(self) -> tuple[str, ...]:
        """The hook point of the scale, for `run_with_cache`; empty without a norm."""
        return () if self.norm is None else (self.norm.hook_scale.name,)

    def frozen(self, x: Vector, scale_at: Callable[[str], Scale]) -> Float[Tensor, "... width"]:
        """Apply the map with the scale that `scale_at` returns for its hook point, without the bias."""
        return self._times(x if self.norm is None else self.norm.linearised(x, scale_at(*self.scales).to(x)))

    def unscaled(self, x: Vector) -> Vector:
        """Apply the map with scale 1, without the bias.

        >>> part = LayerNorm(2, LayerNormPart())
        >>> Passage(part).unscaled(torch.tensor([3.0, 1.0])).tolist(), Passage().unscaled(torch.ones(2)).tolist()
        ([1.0, -1.0], [1.0, 1.0])
        """
        return self._times(x if self.norm is None else self.norm.linearised(x, torch.ones_like(x[..., :1])))

    def scaled_as(self, parts: Vector, whole: Float[Tensor, "*whole width"]) -> Float[Tensor, "... width"]:
        """Apply the map to the parts of a sum with the scale of the sum, without the bias."""
        if self.norm is None:
            return self._times(parts)
        return self._times(self.norm.linearised(parts, self.norm.rms(self.norm.centred(widened(whole)))))

    def folded(self, matrix: Float[Tensor, "*lead width columns"]) -> Float[Tensor, "*lead width columns"]:
        """N W, where x N is the map of x with scale 1: the matrix that W applies to a vector before the norm.

        N = P diag(gain) with P the centring (symmetric), so that N W centres the columns of gain * W.
        """
        if self.norm is None:
            return self._times(matrix)
        gain = self.norm.gain()
        columns = matrix.mT if gain is None else matrix.mT * gain.detach().to(matrix)
        return self._times(self.norm.centred(columns).mT)

    def normalised(self, x: Vector) -> Vector:
        """Centre and scale each vector as the norm does, without its weight and bias."""
        if self.norm is None:
            return x
        centred = self.norm.centred(x)
        return centred / self.norm.rms(centred)

    def bias(self, like: Vector) -> Float[Tensor, "width"]:
        """The output for a vector of zeros."""
        bias = None if self.norm is None else self.norm.bias
        return like.new_zeros(like.shape[-1]) if bias is None else self._times(bias)

    def _times(self, x: Vector) -> Vector:
        return x if self.factor == 1.0 else x * self.factor


def make_norm(width: int, part: NormPart | None) -> Norm | None:
    """Build the norm that a part describes; None for None.

    >>> make_norm(8, None) is None
    True
    """
    if part is None:
        return None
    if isinstance(part, LayerNormPart):
        return LayerNorm(width, part)
    if isinstance(part, RMSNormPart):
        return RMSNorm(width, part)
    raise InputError(f"no module is known for the norm {part!r}; there are LayerNormPart and RMSNormPart")
