"""Attention: q k v, scores, pattern, z, result. One class; positions, mask, score function and q/k norm are parts."""

import math
from contextvars import ContextVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from hooklens.core.hooks import HookedPart, HookPoint
from hooklens.core.precision import as_wide_as, widened
from hooklens.core.scope import Lifetime, Scope
from hooklens.model.config import HookedTransformerConfig
from hooklens.model.dropout import Dropout
from hooklens.model.embed import rotate, soft_cap
from hooklens.model.factored import FactoredMatrix
from hooklens.model.kv_cache import Context, View
from hooklens.model.linear import Linear, is_plain, matrix_of
from hooklens.model.norms import make_norm
from hooklens.model.views import KVHeadWeight

Stream = Float[Tensor, "batch pos d_model"]
Queries = Float[Tensor, "batch query_pos head d_head"]
Keys = Float[Tensor, "batch key_pos kv_head d_head"]
Scores = Float[Tensor, "batch head query_pos key_pos"]
PerHead = Float[Tensor, "batch pos head d_model"]
Queried = Float[Tensor, "batch query_pos d_model"]
#: The inputs that each head reads as query, key and value, if a hook edits them.
OwnInputs = tuple[
    Float[Tensor, "batch query_pos head d_model"] | None,
    Float[Tensor, "batch pos kv_head d_model"] | None,
    Float[Tensor, "batch pos kv_head d_model"] | None,
]

_written_out: ContextVar[tuple[Lifetime, ...]] = ContextVar("hooklens_written_out", default=())
_open_blocks: set[Lifetime] = set()


class differentiable_attention(Scope):
    """A `with` block in which attention is unfused, so that it can be differentiated twice or in forward mode.

    The fused CPU kernel supports neither. The numbers agree up to rounding.
    """

    stack, anywhere = _written_out, _open_blocks

    def begin(self) -> bool:
        return True


class Attention(HookedPart):
    """softmax(q k / scale) v, with each step replaceable by a part."""

    def __init__(self, cfg: HookedTransformerConfig, layer: int):
        super().__init__()
        self.layer, self.n_heads, self.n_kv_heads, self.d_head = layer, cfg.n_heads, cfg.n_key_value_heads, cfg.d_head
        self.mask, self.score, self.rotary = cfg.mask_at(layer), cfg.score_fn, cfg.rotary_at(layer)
        self.scale = self.score.scale or math.sqrt(cfg.d_head)
        d_q, d_kv = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
        self.q = Linear(cfg.d_model, d_q, bias=cfg.biases.qkv)
        self.k = Linear(cfg.d_model, d_kv, bias=cfg.biases.qkv)
        self.v = Linear(cfg.d_model, d_kv, bias=cfg.biases.qkv)
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.q_norm, self.k_norm = make_norm(cfg.d_head, cfg.qk_norm), make_norm(cfg.d_head, cfg.qk_norm)
        if self.rotary is not None:
            self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z, self.hook_result = HookPoint(), HookPoint()
        self.o = Linear(d_q, cfg.d_model, bias=cfg.biases.o)
        self.dropout = Dropout(cfg.dropout)

    def forward(self, x: Stream, ctx: Context, own: OwnInputs = (None, None, None)) -> Queried:
        q, k, v = self.project(x, ctx, own)
        z = self.hook_z(ctx.attend(self, q, k, v))
        return self.output(z)

    def project(self, x: Stream, ctx: Context, own: OwnInputs) -> tuple[Queries, Keys, Keys]:
        """Queries, keys and values, with norm and rotation if configured. A head's own input replaces x."""
        q = self.hook_q(self.heads(self.q, ctx.select(x), own[0]))
        k = self.hook_k(self.heads(self.k, x, own[1]))
        v = self.hook_v(self.heads(self.v, x, own[2]))
        return *self.place(q, k, ctx), v

    def heads(self, linear: nn.Module, x: Stream, own: PerHead | None) -> Float[Tensor, "batch pos any_head d_head"]:
        if own is None:
            return linear(x).unflatten(-1, (-1, self.d_head))
        n = own.shape[2]
        if is_plain(linear):
            weight = linear.weight.view(n, self.d_head, -1)
            out = torch.einsum("bphm,hdm->bphd", own, weight)
            return out if linear.bias is None else out + linear.bias.view(n, self.d_head)
        by_head = [linear(own[:, :, h]).unflatten(-1, (n, self.d_head))[:, :, h] for h in range(n)]
        return torch.stack(by_head, dim=2)

    def place(self, q: Queries, k: Keys, ctx: Context) -> tuple[Queries, Keys]:
        """q/k norm, then rotary."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is None:
            return q, k
        cos, sin = ctx.tables(self.rotary, self.d_head, q.dtype)
        q = self.hook_rot_q(rotate(q, *ctx.query_tables(cos, sin, q.shape[0]), self.rotary.interleaved))
        return q, rotate(k, cos, sin, self.rotary.interleaved)

    def see_keys(self, k: Keys) -> Keys:
        """In rotary models, the hook point for all keys, including cached ones."""
        return self.hook_rot_k(k) if self.rotary is not None else k

    def mix(self, q: Queries, k: Keys, v: Keys, view: View) -> Queries:
        """z: values weighted by the pattern; uses the fused kernel if nothing listens to scores or pattern."""
        if self.fusable(q):
            return self.fused(q, k, v, view)
        scores = self.hook_attn_scores(self.scores(q, k, view))
        pattern = self.score.pattern(scores, view.seen if view.blank else None)
        return self.weigh(self.dropout(self.hook_pattern(pattern.to(v.dtype))), v)

    def fusable(self, q: Queries) -> bool:
        if not self.score.fusable or self.score.soft_cap is not None or self.dropout.active or under_transform(q):
            return False
        if _open_blocks and differentiable_attention.innermost():
            return False
        return not (self.hook_attn_scores.listening() or self.hook_pattern.listening())

    def scores(self, q: Queries, k: Keys, view: View) -> Scores:
        """q k / scale, capped, and masked with -inf. Computed in float32 or wider, like the fused kernel: in half
        precision a product can overflow, and rounding of a large score exceeds the differences between scores.
        torch.autocast is disabled for the same reason.
        """
        batch, n_q, n_k = q.shape[0], q.shape[1], k.shape[1]
        q, k = widened(q), widened(k)
        grouped = q.transpose(1, 2).reshape(batch, self.n_kv_heads, -1, self.d_head)  # heads of a group share keys
        with as_wide_as(q):
            raw = (grouped @ k.permute(0, 2, 3, 1)).view(batch, self.n_heads, n_q, n_k) / self.scale
        raw = soft_cap(raw, self.score.soft_cap)
        if view.causal:
            seen = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril()
            return raw.masked_fill(~seen, -torch.inf)
        return raw if view.seen is None else raw.masked_fill(~view.seen, -torch.inf)

    def weigh(self, pattern: Scores, v: Keys) -> Queries:
        batch, _, n_q, n_k = pattern.shape
        grouped = pattern.reshape(batch, self.n_kv_heads, -1, n_k)
        return (grouped @ v.transpose(1, 2)).view(batch, self.n_heads, n_q, self.d_head).transpose(1, 2)

    def fused(self, q: Queries, k: Keys, v: Keys, view: View) -> Queries:
        seen = view.seen
        blank = None if seen is None or not view.blank else ~seen.any(-1, keepdim=True)
        z = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=seen if blank is None or seen is None else seen | blank,
            is_causal=view.causal,
            scale=1 / self.scale,
            enable_gqa=self.n_heads != self.n_kv_heads,
        )
        return (z if blank is None else z.masked_fill(blank, 0.0)).transpose(1, 2)

    def output(self, z: Queries) -> Queried:
        """The output of the heads: W_O z + b_O, head by head if something listens to `result`."""
        if not self.hook_result.listening():
            return self.o(z.flatten(2))
        result = self.results(z)
        used = self.hook_result(result)
        if used is result:
            return self.o(z.flatten(2))
        summed, bias = used.sum(2), self.output_bias(z)
        return summed if bias is None else summed + bias

    def results(self, z: Queries) -> Float[Tensor, "batch query_pos head d_model"]:
        """z W_O per head, without b_O."""
        if is_plain(self.o):
            return torch.einsum("bqhd,hdm->bqhm", z, self.W_O)
        bias = self.output_bias(z)
        eye = torch.eye(self.n_heads, dtype=z.dtype, device=z.device)
        by_head = [self.o((z * eye[h, :, None]).flatten(2)) - bias for h in range(self.n_heads)]
        return torch.stack(by_head, dim=2)

    def output_matrix(self) -> Float[Tensor, "head d_head d_model"]:
        """W_O, even if `o` is wrapped."""
        return matrix_of(self.o, self.n_heads * self.d_head).T.unflatten(0, (self.n_heads, self.d_head))

    def output_bias(self, z: Queries) -> Float[Tensor, "*one d_model"] | None:
        """The output for z = 0: b_O, even if `o` is wrapped."""
        return self.o.bias if is_plain(self.o) else self.o(torch.zeros_like(z[:1, :1]).flatten(2))

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return self.q.weight.unflatten(0, (-1, self.d_head)).mT

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return self.k.weight.unflatten(0, (-1, self.d_head)).mT.as_subclass(KVHeadWeight)

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return self.v.weight.unflatten(0, (-1, self.d_head)).mT.as_subclass(KVHeadWeight)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return self.o.weight.T.unflatten(0, (-1, self.d_head))

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"] | None:
        return None if self.q.bias is None else self.q.bias.view(-1, self.d_head)

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"] | None:
        return None if self.k.bias is None else self.k.bias.view(-1, self.d_head).as_subclass(KVHeadWeight)

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"] | None:
        return None if self.v.bias is None else self.v.bias.view(-1, self.d_head).as_subclass(KVHeadWeight)

    @property
    def b_O(self) -> Float[Tensor, "d_model"] | None:
        return self.o.bias

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T of every head, with keys of a group repeated for its heads."""
        return FactoredMatrix(self.W_Q, self.W_K.repeat_interleave(self.n_heads // self.n_kv_heads, 0).mT)

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every head, with values of a group repeated for its heads."""
        return FactoredMatrix(self.W_V.repeat_interleave(self.n_heads // self.n_kv_heads, 0), self.W_O)


def under_transform(x: Shaped[Tensor, "..."]) -> bool:
    """Whether the tensor is inside vmap or grad of torch.func, where the fused kernel has no rule."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x)
