"""The ends of the residual stream: embeddings, positions, the unembedding."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hooklens.core.errors import InputError
from hooklens.core.hooks import HookedPart, HookPoint
from hooklens.model.config import DividedScaling, HookedTransformerConfig, Rotary, VectorEmbed
from hooklens.model.linear import Linear, _open_gradients, gradients_into, has_gradient_hooks

Stream = Float[Tensor, "batch pos d_model"]
Angles = Float[Tensor, "*batch pos turned"]


class Embedding(nn.Embedding):
    """A row of the weight for each index; on the meta device no values are drawn."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # see Linear
            super().reset_parameters()


class TokenEmbedding(Embedding):
    """One row of W_E per token, times the part's scale."""

    def __init__(self, cfg: HookedTransformerConfig):
        super().__init__(cfg.d_vocab, cfg.d_model)
        self.scale = cfg.embed.scale

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Stream:
        into = gradients_into.innermost() if _open_gradients else None
        is_collected = into is not None and into.collects_rows and not has_gradient_hooks(self.weight)
        rows = _Rows.apply(self.weight, tokens) if is_collected else super().forward(tokens)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)


class _Rows(torch.autograd.Function):
    """Rows of a weight, whose gradient the vector of an open `gradients_into` block keeps."""

    @staticmethod
    def forward(
        ctx: Any, weight: Float[Tensor, "d_vocab d_model"], tokens: Int[Tensor, "*tokens"]
    ) -> Float[Tensor, "*tokens d_model"]:
        ctx.weight, ctx.tokens, ctx.kept = weight, tokens, gradients_into.innermost().rows
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "*tokens d_model"]) -> tuple[None, None]:
        ctx.kept.append((ctx.weight, ctx.tokens, grad))
        return None, None


class VectorEmbedding(Linear):
    """Vectors `batch pos d_in` mapped linearly into the stream."""

    def __init__(self, cfg: HookedTransformerConfig):
        part: VectorEmbed = cfg.embed
        super().__init__(part.d_in, cfg.d_model, bias=part.bias)


class Unembedding(HookedPart):
    """From the stream to logits, with an optional soft cap last. `hook_out` is before the cap."""

    def __init__(self, cfg: HookedTransformerConfig):
        super().__init__()
        self.soft_cap = cfg.output_logits_soft_cap
        self.hook_in = HookPoint()
        self.linear = Linear(cfg.d_model, cfg.d_vocab_out, bias=cfg.biases.unembed)
        self.hook_out = HookPoint()

    def forward(self, x: Stream) -> Float[Tensor, "batch pos d_vocab"]:
        return self.cap(self.hook_out(self.linear(self.hook_in(x))))

    def cap(self, logits: Float[Tensor, "*lead k"]) -> Float[Tensor, "*lead k"]:
        return soft_cap(logits, self.soft_cap)


def soft_cap(x: Float[Tensor, "*lead k"], cap: float | None) -> Float[Tensor, "*lead k"]:
    """cap * tanh(x / cap), which stays inside +-cap (Bello et al. 2016, section 5.1); unchanged for None.

    >>> round(float(soft_cap(torch.tensor([1000.0]), 30.0)), 3)
    30.0
    """
    return x if cap is None else cap * torch.tanh(x / cap)


def sinusoidal_table(n_ctx: int, d_model: int, base: float = 10000.0) -> Float[Tensor, "n_ctx d_model"]:
    """Sines in even columns, cosines in odd ones (Vaswani et al. 2017, section 3.5), in float64.

    >>> sinusoidal_table(2, 4)[1].tolist()
    [0.841..., 0.540..., 0.0099..., 0.9999...]
    """
    freq = base ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angle = torch.arange(n_ctx, dtype=torch.float64)[:, None] * freq
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :d_model]


class SinusoidalPositions(nn.Module):
    """The fixed table, as a buffer that is rebuilt instead of saved."""

    def __init__(self, cfg: HookedTransformerConfig):
        super().__init__()
        self.base, self.shape = cfg.positional_embedding_type.base, (cfg.n_ctx, cfg.d_model)

    @property
    def weight(self) -> Float[Tensor, "n_ctx d_model"]:
        return sinusoidal_table(*self.shape, self.base)

    def forward(self, positions: Int[Tensor, "*batch pos"]) -> Float[Tensor, "*batch pos d_model"]:
        return self.weight.to(positions.device)[positions]


def rotary_tables(
    part: Rotary,
    d_head: int,
    positions: Int[Tensor, "*batch pos"],
    dtype: torch.dtype,
    lengths: Int[Tensor, "*batch"] | None = None,
) -> tuple[Angles, Angles]:
    """Cosines and signed sines of position times frequency, frequency base^(-2i/dim) (Su et al. 2021, equation 15).

    `lengths` is the number of tokens of each row, for frequencies that depend on it (None: up to the last position).

    >>> cos, sin = rotary_tables(Rotary(), 4, torch.tensor([0, 1]), torch.float32)
    >>> cos[0].tolist(), sin[1].tolist()
    ([1.0, 1.0, 1.0, 1.0], [-0.841..., -0.0099..., 0.841..., 0.0099...])
    """
    dim = part.dim or d_head
    if dim > d_head or dim % 2:
        raise InputError(f"rotary rotates an even number of at most d_head {d_head} dimensions, got {dim}")
    wide = torch.promote_types(dtype, torch.float32)
    freq = 1.0 / part.base ** (torch.arange(0, dim, 2, dtype=wide, device=positions.device) / dim)
    magnitude = 1.0
    if isinstance(part.scaling, DividedScaling):
        lengths = positions.amax(-1) + 1 if lengths is None else lengths
        freq, magnitude = part.scaling.scale(freq, lengths).unsqueeze(-2), part.scaling.magnitude
    elif part.scaling is not None:
        freq = part.scaling.scale(freq)
    angle = positions[..., None].to(wide) * freq
    cos, sin = (angle.cos() * magnitude).to(dtype), (angle.sin() * magnitude).to(dtype)
    if part.interleaved:
        return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(
    x: Float[Tensor, "batch pos head d_head"], cos: Angles, sin: Angles, interleaved: bool
) -> Float[Tensor, "batch pos head d_head"]:
    """Rotate each pair of dimensions by its angle (Su et al. 2021, equation 34); dimensions past the tables stay."""
    dim = cos.shape[-1]
    turned = x if dim == x.shape[-1] else x[..., :dim]
    # (a, b) becomes (a cos - b sin, b cos + a sin): each number times cos, plus its partner times the signed sine.
    partner = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else turned.roll(dim // 2, -1)
    out = torch.addcmul(turned * cos.unsqueeze(-2), partner, sin.unsqueeze(-2))
    return out if turned is x else torch.cat((out, x[..., dim:]), dim=-1)
