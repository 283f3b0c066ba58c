"""One new token through a model that nobody listens to: the numbers of its forward, with far fewer calls.

A step of one row reads every weight once and computes little, so the calls around each product take a quarter of its
time or more. Here no hook point is passed, and where packing pays the layers that read the same input are one product.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooklens.core.hooks import HookPoint, edited_elsewhere
from hooklens.model.attention import Attention
from hooklens.model.block import Block, ParallelBlock, SandwichBlock
from hooklens.model.embed import Unembedding, rotate
from hooklens.model.kv_cache import Context, KVCache
from hooklens.model.linear import Linear, pack, packed_product, packing_wanted
from hooklens.model.mlp import MLP, GatedMLP, activation
from hooklens.model.norms import LayerNorm, Norm, RMSNorm

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

Stream = Float[Tensor, "batch d_model"]
_KNOWN = {
    *(Block, SandwichBlock, ParallelBlock, Attention, MLP, GatedMLP, LayerNorm, RMSNorm, Unembedding),
    *(Linear, nn.Linear, HookPoint),
}


class Decoder:
    """The steps of a generation, on weights that are joined and packed once, where that pays.

    >>> from hooklens.testing import tiny_model
    >>> model, past = tiny_model(), KVCache()
    >>> whole, _ = model([[1, 2, 3]]), model([[1, 2]], kv_cache=past)
    >>> with torch.no_grad():
    ...     step = Decoder(model, rows=1)(torch.tensor([[3]]), past)
    >>> torch.allclose(step, whole[:, -1], atol=1e-5), past.length
    (True, 3)
    """

    @classmethod
    def of(cls, model: "HookedTransformer", rows: int) -> "Decoder | None":
        """A decoder where it would be right: every part is one of ours, as it was made, in one dtype."""
        from hooklens.model.transformer import HookedTransformer

        weights = list(model.parameters())
        alike = len({(w.dtype, w.device) for w in weights}) == 1 and not any(w.is_inference() for w in weights)
        if not alike or type(model) is not HookedTransformer:
            return None
        inner = [module for part in (*model.blocks, model.ln_final, model.unembed) if part for module in part.modules()]
        return cls(model, rows) if all(map(_as_made, inner)) and _unhooked(model) else None

    def __init__(self, model: "HookedTransformer", rows: int):
        self.model = model
        self.points = list(model.hook_points().values())
        self.modules = [module for module in model.modules() if not isinstance(module, HookPoint)]
        held = [(m._parameters, name) for m in self.modules for name in m._parameters]
        self.weights = [(at, name, w, w.data_ptr(), w._version) for at, name in held if (w := at[name]) is not None]
        weight = model.unembed.linear.weight
        packs = weight.dtype == torch.float32 and weight.device.type == "cpu" and packing_wanted(rows)
        join = partial(_Packed, rows=rows) if packs else _Side
        self.layers = [_Layer(block, join) for block in model.blocks]
        self.norm, self.unembed = _short(model.ln_final), join([model.unembed.linear])

    def serves(self) -> bool:
        """Is every weight still what was packed, and does nobody listen?"""
        if edited_elsewhere(self.points) or not all(map(_unhooked, self.modules)):
            return False
        return all(at[name] is w and w._version == v and w.data_ptr() == to for at, name, w, to, v in self.weights)

    def __call__(self, tokens: Int[Tensor, "batch 1"], past: KVCache) -> Float[Tensor, "batch d_vocab"]:
        """Logits of what follows the new token of each row, which joins the cache."""
        model = self.model
        ctx = model._context(tokens, None, past)
        x = model.embed_input(tokens, ctx)[:, 0]
        for layer in self.layers:
            x = layer(x, ctx, past)
        past.advance(tokens, ctx)
        return model.unembed.cap(self.unembed(x if self.norm is None else self.norm(x)))


class _Side:
    """Layers that read the same input, one product each.

    Joining their weights would copy them, which takes as long as a few tokens do, and one product is no faster for it.
    """

    def __init__(self, layers: Sequence[nn.Linear]):
        self.layers = [(x.weight.detach().t(), None if x.bias is None else x.bias.detach()) for x in layers]

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """What the layers give, side by side."""
        each = self.apart(x)
        return each[0] if len(each) == 1 else torch.cat(each, 1)

    def apart(self, x: Float[Tensor, "batch d_in"]) -> list[Float[Tensor, "batch _"]]:
        """What each layer gives."""
        return [torch.mm(x, w) if bias is None else torch.addmm(bias, x, w) for w, bias in self.layers]


class _Packed:
    """The same as one product, on weights packed for so many rows."""

    def __init__(self, layers: Sequence[nn.Linear], *, rows: int):
        weights, biases = [layer.weight.detach() for layer in layers], [layer.bias for layer in layers]
        self.sizes = [len(weight) for weight in weights]
        self.weight = pack(torch.cat(weights) if len(weights) > 1 else weights[0], rows)
        self.bias: Float[Tensor, " d_out"] | None = None
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            self.bias = torch.cat([w.new_zeros(len(w)) if b is None else b.detach() for w, b in pairs])

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        return packed_product(x, self.weight, self.bias)

    def apart(self, x: Float[Tensor, "batch d_in"]) -> Sequence[Float[Tensor, "batch _"]]:
        return self(x).split(self.sizes, 1)


_Joint = _Side | _Packed


def _short(norm: Norm | None) -> Callable[[Stream], Stream] | None:
    """The norm in few calls: torch's own RMS norm takes a dozen on a CPU, which for one row is all of its time."""
    if not isinstance(norm, RMSNorm) or norm.offset or norm.weight is None or norm.weight.dtype.itemsize < 4:
        return None if norm is None else norm.fused
    weight, share = norm.weight.detach(), 1 / norm.width
    eps = torch.tensor([[norm.eps]], dtype=weight.dtype, device=weight.device)

    def rms_norm(x: Stream) -> Stream:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(eps, size, size, value=share).rsqrt_() * weight

    return rms_norm


class _Layer:
    """A block, from the stream that enters it to the one that leaves it. The seams of Block, without its points."""

    def __init__(self, block: Block, join: Callable[[Sequence[nn.Linear]], _Joint]):
        self.attn: Attention = block.attn
        self.mlp = mlp = block.mlp
        self.parallel = not block.mlp_reads_attn
        self.norms = [_short(norm) for norm in (block.ln1, block.ln1_post)]
        self.fused = self.attn.score.fusable and self.attn.soft_cap is None
        self.qkv, self.o = join([self.attn.q, self.attn.k, self.attn.v]), join([self.attn.o])
        self.heads = [self.attn.n_heads, self.attn.n_kv_heads, self.attn.n_kv_heads]
        if mlp is not None:
            self.norms += [_short(norm) for norm in (block.ln2, block.ln2_post)]
            self.act, self.gated = activation(mlp.act), isinstance(mlp, GatedMLP)
            self.into = join([mlp.gate, mlp.in_] if isinstance(mlp, GatedMLP) else [mlp.in_])
            self.out = join([mlp.out])

    def __call__(self, x: Stream, ctx: Context, past: KVCache) -> Stream:
        ln1, ln1_post = self.norms[:2]
        wrote = self.o(self.mixed(x if ln1 is None else ln1(x), ctx, past))
        mid = x + (wrote if ln1_post is None else ln1_post(wrote))
        if self.mlp is None:
            return mid
        ln2, ln2_post = self.norms[2:]
        read = x if self.parallel else mid
        wrote = self.out(self.neurons(read if ln2 is None else ln2(read)))
        return mid + (wrote if ln2_post is None else ln2_post(wrote))

    def mixed(self, x: Stream, ctx: Context, past: KVCache) -> Float[Tensor, "batch heads_by_d_head"]:
        attn = self.attn
        each = self.qkv(x).view(len(x), 1, -1, attn.d_head)
        n_q, n_kv = attn.n_heads, attn.n_kv_heads
        if attn.q_norm is not None or attn.rotary is None:
            q, k, v = each.split(self.heads, 2)
            q, k = attn.place(q, k, ctx)
        else:  # queries and keys are turned alike, so in one go
            cos, sin = ctx.tables(attn.rotary, attn.d_head, each.dtype)
            turned = rotate(each.narrow(2, 0, n_q + n_kv), cos, sin, attn.rotary.interleaved)
            q, k, v = turned.narrow(2, 0, n_q), turned.narrow(2, n_q, n_kv), each.narrow(2, n_q + n_kv, n_kv)
        k, v = past.extend(attn.layer, k, v)
        mix = attn.fused if self.fused else attn.mix
        return mix(q, k, v, ctx.view(attn.mask)).flatten(1)

    def neurons(self, x: Stream) -> Float[Tensor, "batch d_mlp"]:
        if not self.gated:
            return self.act(self.into(x))
        gate, linear = self.into.apart(x)
        return self.act(gate) * linear


def _as_made(module: nn.Module) -> bool:
    """Is the module one of ours whose forward nobody replaced?"""
    return type(module) in _KNOWN and _unhooked(module)


def _unhooked(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
