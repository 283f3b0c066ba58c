"""A fast forward pass of one new token for a model without listeners: the same numbers with far fewer calls.

A step of one row reads every weight once and computes little, so the calls around each product take a quarter of its
time or more. Here hook points are skipped, and layers that read the same input are one product if packing pays.
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooklens.core.hooks import HookPoint, edited_elsewhere
from hooklens.model.attention import Attention
from hooklens.model.block import Block, ParallelBlock, SandwichBlock
from hooklens.model.config import Rotary
from hooklens.model.embed import Unembedding
from hooklens.model.kv_cache import Context, KVCache
from hooklens.model.linear import Linear, pack, packed_product, packing_wanted, vector_pays
from hooklens.model.mlp import MLP, GatedMLP, activation
from hooklens.model.norms import LayerNorm, Norm, RMSNorm

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

Stream = Float[Tensor, "*batch d_model"]  # without batch for a single vector
# Packing the weights takes about as much time as it saves in this many steps.
PACKING_PAYS_FROM = 24
_KNOWN = {
    *(Block, SandwichBlock, ParallelBlock, Attention, MLP, GatedMLP, LayerNorm, RMSNorm, Unembedding),
    *(Linear, nn.Linear, HookPoint),
}


class Decoder:
    """The steps of a generation; weights are joined and packed once if that pays for this number of steps.

    >>> from hooklens.testing import tiny_model
    >>> model, past = tiny_model(), KVCache()
    >>> whole, _ = model([[1, 2, 3]]), model([[1, 2]], kv_cache=past)
    >>> with torch.no_grad():
    ...     step = Decoder(model, rows=1)(torch.tensor([[3]]), past)
    >>> torch.allclose(step, whole[:, -1], atol=1e-5), past.length
    (True, 3)
    """

    @classmethod
    def of(cls, model: "HookedTransformer", rows: int, *, steps: int = PACKING_PAYS_FROM) -> "Decoder | None":
        """A decoder, or None under autocast or unless all modules are unmodified ones of hooklens and of one dtype."""
        from hooklens.model.transformer import HookedTransformer

        weights = list(model.parameters())
        alike = len({(w.dtype, w.device) for w in weights}) == 1 and not any(w.is_inference() for w in weights)
        if not alike or type(model) is not HookedTransformer or torch.is_autocast_enabled(model.device.type):
            return None
        inner = [module for part in (*model.blocks, model.ln_final, model.unembed) if part for module in part.modules()]
        is_known = all(type(module) in _KNOWN for module in inner) and not _hooked(map(vars, inner))
        return cls(model, rows, steps=steps) if is_known else None

    def __init__(self, model: "HookedTransformer", rows: int, *, steps: int = PACKING_PAYS_FROM):
        self.model = model
        self.points = list(model.hook_points().values())
        modules = [module for module in model.modules() if not isinstance(module, HookPoint)]
        self.parts = [vars(module) for module in modules]
        held = [(m._parameters, name) for m in modules for name in m._parameters]
        self.held = [(at, name) for at, name in held if at[name] is not None]
        self.weights = [weight for at, name in self.held if (weight := at[name]) is not None]
        self.state = _state(self.weights)
        product = self._product(rows, steps)
        self.layers = [_Layer(block, product) for block in model.blocks]
        self.unembed = product([model.unembed.linear])
        self.vector = isinstance(self.unembed, _Vector)
        self.norm = _short(model.ln_final, self.vector)
        self.rows = 0

    def _product(self, rows: int, steps: int) -> Callable[[Sequence[nn.Linear]], "_Rows"]:
        """The kind of product of one input with the weights of several layers."""
        weight = self.model.unembed.linear.weight
        if weight.device.type != "cpu":
            return _Rows
        if steps >= PACKING_PAYS_FROM and weight.dtype == torch.float32 and packing_wanted(rows):
            return partial(_Packed, rows=rows)
        if rows > 1 or weight.dtype.itemsize < 4:
            return _Rows
        alike: dict[torch.Size, list[Float[Tensor, "d_out d_in"]]] = {}
        for parameter in self.model.parameters():
            alike.setdefault(parameter.shape, []).append(parameter)
        return partial(_Vector, alike=alike)

    def serves(self) -> bool:
        """Whether every weight is unchanged and no hook is active."""
        if edited_elsewhere(self.points) or _hooked(self.parts):
            return False
        same = all(map(operator.is_, self.weights, [at[name] for at, name in self.held]))
        return same and self.state == _state(self.weights)

    def __call__(self, tokens: Int[Tensor, "batch 1"], past: KVCache) -> Float[Tensor, "batch d_vocab"]:
        """Append the new token of each row to the cache and return the logits after it."""
        model = self.model
        ctx = model._context(tokens, None, past)
        x = model.embed_input(tokens, ctx)[:, 0]
        if len(x) != self.rows:
            self.rows = len(x)
            with torch.inference_mode(False):  # buffers of the inference mode could not be written to outside it
                for layer in self.layers:
                    layer.fit(self.rows)
        x = x[0] if self.vector else x
        turns: dict[Rotary, _Turn] = {}
        for layer in self.layers:
            x = layer(x, ctx, past, turns)
        past.advance(tokens, ctx)
        logits = model.unembed.cap(self.unembed(x if self.norm is None else self.norm(x)))
        return logits[None] if self.vector else logits


class _Rows:
    """Layers that read the same input, with plain weights: one product each, side by side in a buffer.

    Joining the weights would copy them, which takes as long as a few tokens, and one product is not faster.
    """

    def __init__(self, layers: Sequence[nn.Linear]):
        self.sizes = [layer.out_features for layer in layers]
        self.layers = [(x.weight.detach(), None if x.bias is None else x.bias.detach()) for x in layers]
        self.products = [_of_rows] * len(layers)

    def fit(self, rows: int) -> list[Float[Tensor, "..."]]:
        """Allocate the buffer for the outputs of this number of rows; return each layer's share of it."""
        self.buffer = self.layers[0][0].new_empty(rows, sum(self.sizes))
        self.shares = list(self.buffer.split(self.sizes, 1))
        return self.shares

    def fill(self, x: Stream) -> None:
        """Write the output of each layer into its share of the buffer."""
        for (weight, bias), product, share in zip(self.layers, self.products, self.shares, strict=True):
            product(x, weight, bias, share)

    def __call__(self, x: Stream) -> Float[Tensor, "*batch d_out"]:
        """The output of the only layer."""
        return self.products[0](x, *self.layers[0])

    def onto(self, stream: Stream, x: Float[Tensor, "*batch d_in"]) -> Stream:
        """The stream plus the output of the only layer, which is rounded first in half precision, as in the model."""
        weight, bias = self.layers[0]
        joins = bias is None and weight.dtype.itemsize >= 4
        return self.products[0](x, weight, stream) if joins else stream + self(x)


class _Vector(_Rows):
    """The same for one row without its axis, which saves calls; BLAS multiplies vectors or rows, as is faster here."""

    def __init__(self, layers: Sequence[nn.Linear], *, alike: dict[torch.Size, list[Float[Tensor, "d_out d_in"]]]):
        super().__init__(layers)
        self.products = [_of_vector if vector_pays(alike[weight.shape]) else _of_row for weight, _ in self.layers]

    def fit(self, rows: int) -> list[Float[Tensor, "..."]]:
        self.shares = [share[0] for share in super().fit(rows)]
        return self.shares


def _of_rows(x: Tensor, weight: Tensor, plus: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x times the weight, plus a bias or a stream."""
    if plus is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(plus, x, weight.t(), out=out)


def _of_vector(x: Tensor, weight: Tensor, plus: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mv(weight, x, out=out) if plus is None else torch.addmv(plus, weight, x, out=out)


def _of_row(x: Tensor, weight: Tensor, plus: Tensor | None, out: Tensor | None = None) -> Tensor:
    return _of_rows(x[None], weight, plus, None if out is None else out[None])[0]


class _Packed(_Rows):
    """The same as one product, with weights joined and packed for this number of rows."""

    def __init__(self, layers: Sequence[nn.Linear], *, rows: int):
        super().__init__(layers)
        weights, biases = zip(*self.layers, strict=True)
        self.weight = pack(torch.cat(weights) if len(weights) > 1 else weights[0], rows)
        self.bias: Float[Tensor, " d_out"] | None = None
        if any(bias is not None for bias in biases):
            rows_of_bias = [w.new_zeros(len(w)) if b is None else b for w, b in self.layers]
            self.bias = torch.cat(rows_of_bias)

    def fill(self, x: Stream) -> None:
        self.buffer.copy_(self(x))

    def __call__(self, x: Stream) -> Float[Tensor, "batch d_out"]:
        return packed_product(x, self.weight, self.bias)

    def onto(self, stream: Stream, x: Float[Tensor, "batch d_in"]) -> Stream:
        return self(x).add_(stream)


def _short(norm: Norm | None, vector: bool) -> Callable[[Stream], Stream] | None:
    """The norm in few calls: torch's RMS norm makes a dozen on a CPU, which takes most of the time for one row."""
    if not isinstance(norm, RMSNorm) or norm.offset or norm.weight is None or norm.weight.dtype.itemsize < 4:
        return None if norm is None else norm.fused
    weight, share, eps = norm.weight.detach(), 1 / norm.width, norm.eps
    zero, least = weight.new_zeros(1), weight.new_full((1, 1), eps)

    def of_vector(x: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        square = torch.dot(x, x).item() * share + eps
        return torch.addcmul(zero, x, weight, value=square**-0.5 if square else math.inf)

    def of_rows(x: Stream) -> Stream:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(least, size, size, value=share).rsqrt_() * weight

    return of_vector if vector else of_rows


class _Turn(NamedTuple):
    """Rotary tables of one step: cosines, and the signed sines of the first and second number of each pair."""

    cos: Float[Tensor, "#batch 1 1 d_head"]
    first: Float[Tensor, "#batch 1 1 half"]
    second: Float[Tensor, "#batch 1 1 half"]

    @classmethod
    def of(cls, rotary: Rotary, d_head: int, dtype: torch.dtype, ctx: Context) -> "_Turn":
        cos, sin = (table.unsqueeze(-2) for table in ctx.tables(rotary, d_head, dtype))
        return cls(F.pad(cos, (0, d_head - cos.shape[-1]), value=1.0), *_pairs(sin, rotary.interleaved))


def _pairs(x: Float[Tensor, "*lead dim"], interleaved: bool) -> Sequence[Float[Tensor, "*lead half"]]:
    """The first and the second number of every pair that is rotated."""
    return (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)


class _Layer:
    """A block without its hook points, from the incoming to the outgoing stream."""

    def __init__(self, block: Block, product: Callable[[Sequence[nn.Linear]], _Rows]):
        self.attn: Attention = block.attn
        self.mlp = mlp = block.mlp
        self.parallel = not block.mlp_reads_attn
        self.qkv, self.o = product([self.attn.q, self.attn.k, self.attn.v]), product([self.attn.o])
        vector = isinstance(self.qkv, _Vector)
        self.norms = [_short(norm, vector) for norm in (block.ln1, block.ln1_post)]
        self.fused = self.attn.score.fusable and self.attn.score.soft_cap is None
        self.rotary = self.attn.rotary if self.attn.q_norm is None else None  # norms come between: see Attention.place
        if mlp is not None:
            self.norms += [_short(norm, vector) for norm in (block.ln2, block.ln2_post)]
            self.act = activation(mlp.act)
            self.into = product([mlp.gate, mlp.in_] if isinstance(mlp, GatedMLP) else [mlp.in_])
            self.out = product([mlp.out])

    def fit(self, rows: int) -> None:
        """Allocate the buffers for this number of rows, and every view of them that a step uses."""
        attn = self.attn
        n_q, n_kv, d_head = attn.n_heads, attn.n_kv_heads, attn.d_head
        self.qkv.fit(rows)
        heads = self.qkv.buffer.view(rows, 1, -1, d_head)
        self.q, self.k, self.v = heads.split([n_q, n_kv, n_kv], 2)
        if self.rotary is not None:  # queries and keys are rotated together
            self.before = heads.narrow(2, 0, n_q + n_kv)
            self.turned = torch.empty_like(self.before)
            dim, interleaved = self.rotary.dim or d_head, self.rotary.interleaved
            self.first, self.second = _pairs(self.before[..., :dim], interleaved)
            self.turned_first, self.turned_second = _pairs(self.turned[..., :dim], interleaved)
            self.q, self.k = self.turned.split([n_q, n_kv], 2)
        if self.mlp is not None:
            self.neurons = self.into.fit(rows)

    def __call__(self, x: Stream, ctx: Context, past: KVCache, turns: dict[Rotary, _Turn]) -> Stream:
        ln1, ln1_post = self.norms[:2]
        z = self.mixed(x if ln1 is None else ln1(x), ctx, past, turns).reshape(*x.shape[:-1], -1)
        mid = self.o.onto(x, z) if ln1_post is None else x + ln1_post(self.o(z))
        if self.mlp is None:
            return mid
        ln2, ln2_post = self.norms[2:]
        read = x if self.parallel else mid
        self.into.fill(read if ln2 is None else ln2(read))
        post = self.act(self.neurons[0])
        if len(self.neurons) == 2:
            post.mul_(self.neurons[1])  # a new tensor, or a view of the buffer
        return self.out.onto(mid, post) if ln2_post is None else mid + ln2_post(self.out(post))

    def mixed(
        self, x: Stream, ctx: Context, past: KVCache, turns: dict[Rotary, _Turn]
    ) -> Float[Tensor, "batch #head #head d_head"]:
        """z: the values of each head, weighted by its pattern."""
        attn, q, k = self.attn, self.q, self.k
        self.qkv.fill(x)
        if self.rotary is None:
            q, k = attn.place(q, k, ctx)
        else:
            turn = turns.get(self.rotary) or turns.setdefault(
                self.rotary, _Turn.of(self.rotary, attn.d_head, x.dtype, ctx)
            )
            torch.mul(self.before, turn.cos, out=self.turned)
            self.turned_first.addcmul_(self.second, turn.first)
            self.turned_second.addcmul_(self.first, turn.second)
        k, v = past.extend(attn.layer, k, self.v)
        view = ctx.view(attn.mask)
        if not self.fused:
            return attn.mix(q, k, v, view)
        if view.seen is not None:
            return attn.fused(q, k, v, view)
        # One query that sees every key: Attention.fused without the calls for masks.
        return F.scaled_dot_product_attention(
            q.view(len(q), attn.n_heads, 1, attn.d_head),
            k.transpose(1, 2),
            v.transpose(1, 2),
            scale=1 / attn.scale,
            enable_gqa=attn.n_heads != attn.n_kv_heads,
        )


def _state(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    """What changes if a weight is edited or given other data."""
    return [(weight._version, weight.data_ptr()) for weight in weights]


def _hooked(parts: Iterable[dict[str, Any]]) -> bool:
    """Whether one of these modules, given by their attributes, has a torch hook or a replaced forward."""
    return any(part["_forward_hooks"] or part["_forward_pre_hooks"] or "forward" in part for part in parts)
