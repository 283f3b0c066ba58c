"""A fast forward pass of one new token for a model without listeners: the same numbers with far fewer calls.

A step of one row reads every weight once and computes little, so the calls around each product take a quarter of its
time or more. Here hook points are skipped, and layers that read the same input are one product if packing pays.
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from hooklens.core.hooks import HookPoint, edited_elsewhere
from hooklens.core.precision import is_autocast
from hooklens.model.attention import Attention
from hooklens.model.block import Block, ParallelBlock, SandwichBlock
from hooklens.model.config import Rotary
from hooklens.model.dropout import Dropout
from hooklens.model.embed import Unembedding
from hooklens.model.kv_cache import Context, Joined, KVCache, View
from hooklens.model.linear import Linear, pack, packed_product, packing_wanted, vector_pays
from hooklens.model.mlp import MLP, GatedMLP, activation
from hooklens.model.norms import LayerNorm, Norm, RMSNorm

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

Stream = Float[Tensor, "*batch d_model"]  # without batch for a single vector
Turn = tuple[Tensor, Tensor, Tensor]  # cosines, and signed sines of the first and the second number of each pair
Step = tuple[Context, View, Turn | None]  # what layers with one mask and one rotary share in a step
Memory = tuple[Tensor, Tensor, Tensor]  # of a layer: the place of the new key and value, all keys, all values
Product = Callable[..., Tensor]  # of `x`, and `out` where the output is to be written
# Packing the weights takes about as much time as it saves in this many steps.
PACKING_PAYS_FROM = 24
# Rotary tables are computed for this many positions at a time.
TURNS_AHEAD = 32
_KNOWN = {
    *(Block, SandwichBlock, ParallelBlock, Attention, MLP, GatedMLP, LayerNorm, RMSNorm, Unembedding),
    *(Linear, nn.Linear, HookPoint, Dropout),
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
        from hooklens.model.transformer import HookedTransformer, methods_replaced

        weights = list(model.parameters())
        alike = len({(w.dtype, w.device) for w in weights}) == 1 and not any(w.is_inference() for w in weights)
        if not alike or type(model) is not HookedTransformer or is_autocast(model.device):
            return None
        inner = [module for part in (*model.blocks, model.ln_final, model.unembed) if part for module in part.modules()]
        is_known = all(type(module) in _KNOWN for module in inner) and not _hooked(map(vars, inner))
        return cls(model, rows, steps=steps) if is_known and not methods_replaced([model, *inner]) else None

    def __init__(self, model: "HookedTransformer", rows: int, *, steps: int = PACKING_PAYS_FROM):
        self.model = model
        self.points = list(model.hook_points().values())
        modules = [module for module in model.modules() if not isinstance(module, HookPoint)]
        self.parts = [vars(module) for module in modules]
        self.dropouts = [module for module in modules if isinstance(module, Dropout) and module.p > 0]
        self.tables = [table for module in modules for table in (module._parameters, module._modules)]
        self.held = _held(self.tables)
        self.weights: list[Any] = [held for held in self.held if isinstance(held, Tensor)]
        self.state = _state(self.weights)
        product = self._product(rows, steps)
        self.layers = [_Layer(block, product) for block in model.blocks]
        self.kinds = list(dict.fromkeys((layer.attn.mask, layer.rotary) for layer in self.layers))
        self.kind_of = [self.kinds.index((layer.attn.mask, layer.rotary)) for layer in self.layers]
        self.turns = [None if rotary is None else _Turns(rotary, model.cfg.d_head) for _, rotary in self.kinds]
        self.unembed = product([model.unembed.linear])
        self.vector = isinstance(self.unembed, _Vector)
        self.norm = _short(model.ln_final, self.vector)
        self.rows = 0
        self.joined: Joined | None = None

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
        for held in self.weights:
            alike.setdefault(held.shape, []).append(held)
        return partial(_Vector, alike=alike)

    def serves(self) -> bool:
        """Whether every module and weight is unchanged, no hook is active and nothing is dropped."""
        if edited_elsewhere(self.points) or _hooked(self.parts) or any(part.active for part in self.dropouts):
            return False
        held = _held(self.tables)
        same = len(held) == len(self.held) and all(map(operator.is_, self.held, held))
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
        store, _ = self.joined = past.joined(len(self.layers), self.layers[0].k, self.joined)
        new, kept = store.select(2, ctx.offset), store.narrow(2, 0, ctx.offset + 1)
        keys, values = kept.permute((3, 0, 1, 4, 2, 5))
        memories = zip(new.unbind(), keys.unbind(), values.unbind(), strict=True)  # of all layers in a few calls
        turns = [None if turns is None else turns.at(ctx, x.dtype) for turns in self.turns]
        steps = [(ctx, ctx.view(mask), turn) for (mask, _), turn in zip(self.kinds, turns, strict=True)]
        x = x[0] if self.vector else x
        for layer, kind, memory in zip(self.layers, self.kind_of, memories, strict=True):
            x = layer(x, steps[kind], memory)
        past.advance(tokens, ctx)
        logits = model.unembed.cap(self.unembed(x if self.norm is None else self.norm(x)))
        return logits[None] if self.vector else logits


class _Rows:
    """Layers that read the same input, with plain weights: one product each, each into its own place.

    Joining the weights would copy them, which takes as long as a few tokens, and one product is not faster.
    """

    def __init__(self, layers: Sequence[nn.Linear]):
        self.sizes = [layer.out_features for layer in layers]
        self.layers = [(x.weight.detach(), None if x.bias is None else x.bias.detach()) for x in layers]
        self.products = [self._product(weight, bias) for weight, bias in self.layers]
        self.weight, bias = self.layers[0]
        self.across = self.weight.t()
        self.joins = bias is None and self.weight.dtype.itemsize >= 4  # half precision rounds before the sum

    def _product(self, weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None) -> Product:
        """The product of an input with this weight, plus a bias: a function of `x` and `out` without a Python frame."""
        if bias is None:
            return partial(torch.mm, mat2=weight.t())
        return partial(torch.addmm, bias, mat2=weight.t())

    def fit(self, places: list[Float[Tensor, "rows _size"]]) -> None:
        """Write the outputs of the layers into these places from now on."""
        self.places = places

    def fill(self, x: Stream) -> None:
        """Write the output of each layer into its place."""
        for product, place in zip(self.products, self.places, strict=True):
            product(x, out=place)

    def outputs(self, x: Stream) -> Sequence[Float[Tensor, "..."]]:
        """The output of each layer, until the next call."""
        self.fill(x)
        return self.places

    def __call__(self, x: Stream) -> Float[Tensor, "*batch d_out"]:
        """The output of the only layer."""
        return self.products[0](x)

    def onto(self, stream: Stream, x: Float[Tensor, "*batch d_in"]) -> Stream:
        """Add the output of the only layer to the stream, in place."""
        return stream.addmm_(x, self.across) if self.joins else stream.add_(self(x))


class _Vector(_Rows):
    """The same for one row without its axis, which saves calls; BLAS multiplies vectors or rows, as is faster here."""

    def __init__(self, layers: Sequence[nn.Linear], *, alike: dict[torch.Size, list[Float[Tensor, "d_out d_in"]]]):
        self.alike = alike
        super().__init__(layers)
        self.joins = self.joins and vector_pays(alike[self.weight.shape])

    def _product(self, weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None) -> Product:
        if not vector_pays(self.alike[weight.shape]):
            return partial(_of_row, super()._product(weight, bias))
        return partial(torch.mv, weight) if bias is None else partial(torch.addmv, bias, weight)

    def fit(self, places: list[Float[Tensor, "rows _size"]]) -> None:
        self.places = [place[0] for place in places]

    def onto(self, stream: Stream, x: Float[Tensor, " d_in"]) -> Stream:
        return stream.addmv_(self.weight, x) if self.joins else stream.add_(self(x))


def _of_row(product: Product, x: Tensor, *, out: Tensor | None = None) -> Tensor:
    return product(x[None], out=None if out is None else out[None])[0]


class _Packed(_Rows):
    """The same as one product, with weights joined and packed for this number of rows."""

    def __init__(self, layers: Sequence[nn.Linear], *, rows: int):
        super().__init__(layers)
        weights, biases = zip(*self.layers, strict=True)
        self.packed = pack(torch.cat(weights) if len(weights) > 1 else weights[0], rows)
        self.bias: Float[Tensor, " d_out"] | None = None
        if any(bias is not None for bias in biases):
            rows_of_bias = [w.new_zeros(len(w)) if b is None else b for w, b in self.layers]
            self.bias = torch.cat(rows_of_bias)

    def outputs(self, x: Stream) -> Sequence[Float[Tensor, "batch _size"]]:
        return self(x).split(self.sizes, 1)

    def fill(self, x: Stream) -> None:
        for place, output in zip(self.places, self.outputs(x), strict=True):
            place.copy_(output)

    def __call__(self, x: Stream) -> Float[Tensor, "batch d_out"]:
        return packed_product(x, self.packed, self.bias)

    def onto(self, stream: Stream, x: Float[Tensor, "batch d_in"]) -> Stream:
        return stream.add_(self(x))


def _short(norm: Norm | None, vector: bool) -> Callable[[Stream], Stream] | None:
    """The norm in few calls: torch's RMS norm makes a dozen on a CPU, which takes most of the time for one row."""
    if not isinstance(norm, RMSNorm) or norm.offset or norm.weight is None or norm.weight.dtype.itemsize < 4:
        return None if norm is None else norm.fused
    weight, share, eps = norm.weight.detach(), 1 / norm.width, norm.eps
    zero, least = weight.new_zeros(1), weight.new_full((1, 1), eps)

    def of_vector(x: Tensor) -> Tensor:  # plain types: the others would be made anew for every norm
        square = torch.dot(x, x).item() * share + eps
        return torch.addcmul(zero, x, weight, value=square**-0.5 if square else math.inf)

    def of_rows(x: Stream) -> Stream:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(least, size, size, value=share).rsqrt_() * weight

    return of_vector if vector else of_rows


class _Turns:
    """The rotary tables of the steps. Where positions are those of the cache, many steps' are computed at once."""

    def __init__(self, rotary: Rotary, d_head: int):
        self.rotary, self.d_head = rotary, d_head
        self.start, self.ahead = -1, list[Turn]()

    def at(self, ctx: Context, dtype: torch.dtype) -> Turn:
        if ctx.key_seen is not None or ctx.lengths is not None:  # padding, or frequencies that depend on the length
            return self._tables(ctx, dtype)
        start = ctx.offset - ctx.offset % TURNS_AHEAD
        if start != self.start:
            positions = torch.arange(start, start + TURNS_AHEAD, device=ctx.positions.device)
            tables = self._tables(Context(positions), dtype)
            self.start, self.ahead = start, list(zip(*(table.split(1, 1) for table in tables), strict=True))
        return self.ahead[ctx.offset - start]

    def _tables(self, ctx: Context, dtype: torch.dtype) -> Turn:
        cos, sin = (table.unsqueeze(-2) for table in ctx.tables(self.rotary, self.d_head, dtype))
        cos = F.pad(cos, (0, self.d_head - cos.shape[-1]), value=1.0)
        first, second = _pairs(sin, self.rotary.interleaved)
        return cos, first, second


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
        self.vector = isinstance(self.qkv, _Vector)
        self.ln1, self.ln1_post = (_short(norm, self.vector) for norm in (block.ln1, block.ln1_post))
        self.fused = self.attn.score.fusable and self.attn.score.soft_cap is None
        self.scale, self.grouped = 1 / self.attn.scale, self.attn.n_heads != self.attn.n_kv_heads
        self.rotary = self.attn.rotary if self.attn.q_norm is None else None  # norms come between: see Attention.place
        if mlp is not None:
            self.ln2, self.ln2_post = (_short(norm, self.vector) for norm in (block.ln2, block.ln2_post))
            self.act = activation(mlp.act)
            self.into = product([mlp.gate, mlp.in_] if isinstance(mlp, GatedMLP) else [mlp.in_])
            self.out = product([mlp.out])

    def fit(self, rows: int) -> None:
        """Allocate the buffers for this number of rows, and every view of them that a step uses."""
        new, d_head, n_q, n_kv = self.qkv.weight.new_empty, self.attn.d_head, self.attn.n_heads, self.attn.n_kv_heads
        heads = new(rows, 1, n_q + 2 * n_kv, d_head)  # as attention uses them: keys and values lie side by side
        self.q, self.k, v = heads.split([n_q, n_kv, n_kv], 2)
        self.query = self.q.transpose(1, 2)
        self.kv = heads[:, 0, n_q:].unflatten(1, (2, n_kv))
        q, k = self.q, self.k
        if self.rotary is not None:  # queries and keys are rotated together
            self.turned = heads.narrow(2, 0, n_q + n_kv)
            self.before = torch.empty_like(self.turned)
            q, k = self.before.split([n_q, n_kv], 2)
            dim, interleaved = self.rotary.dim or d_head, self.rotary.interleaved
            self.first, self.second = _pairs(self.before[..., :dim], interleaved)
            self.turned_first, self.turned_second = _pairs(self.turned[..., :dim], interleaved)
        self.qkv.fit([x.flatten(1) for x in (q, k, v)])
        if self.mlp is not None:
            self.into.fit([new(rows, size) for size in self.into.sizes])

    def __call__(self, x: Stream, step: Step, memory: Memory) -> Stream:
        z = self.mixed(x if self.ln1 is None else self.ln1(x), step, memory).flatten(0 if self.vector else 1)
        if self.ln1_post is not None:
            mid = x + self.ln1_post(self.o(z))
        else:
            mid = self.o.onto(x.clone() if self.parallel else x, z)
        if self.mlp is None:
            return mid
        read = x if self.parallel else mid
        post, *linear = self.into.outputs(read if self.ln2 is None else self.ln2(read))
        post = self.act(post)
        if linear:
            post.mul_(linear[0])  # a new tensor, or a view of the buffer
        return self.out.onto(mid, post) if self.ln2_post is None else mid + self.ln2_post(self.out(post))

    def mixed(self, x: Stream, step: Step, memory: Memory) -> Float[Tensor, "batch #head #head d_head"]:
        """z: the values of each head, weighted by its pattern."""
        attn, query, (ctx, view, turn), (new, keys, values) = self.attn, self.query, step, memory
        self.qkv.fill(x)
        if turn is not None:
            cos, first, second = turn
            torch.mul(self.before, cos, out=self.turned)
            self.turned_first.addcmul_(self.second, first)
            self.turned_second.addcmul_(self.first, second)
        else:
            q, k = attn.place(self.q, self.k, ctx)
            query = q.transpose(1, 2)
            if k is not self.k:
                self.k.copy_(k)
        new.copy_(self.kv)
        if self.fused and view.seen is None:
            # One query that sees every key: Attention.fused without the calls for masks.
            return F.scaled_dot_product_attention(query, keys, values, scale=self.scale, enable_gqa=self.grouped)
        mix = attn.fused if self.fused else attn.mix
        return mix(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), view)


def _held(tables: Iterable[dict[str, Any]]) -> list[Any]:
    """The parameters and modules, and None where there is none, that modules hold now."""
    return list(chain.from_iterable(map(dict.values, tables)))


def _state(weights: list[Tensor]) -> tuple[list[int], list[int]]:
    """What changes if a weight is edited or given other data."""
    return list(map(operator.attrgetter("_version"), weights)), list(map(Tensor.data_ptr, weights))


def _hooked(parts: Iterable[dict[str, Any]]) -> bool:
    """Whether one of these modules, given by their attributes, has a torch hook or a replaced forward."""
    if _has_any_global_hook():
        return True
    return any(part["_forward_hooks"] or part["_forward_pre_hooks"] or "forward" in part for part in parts)
