"""Do positions alone make a head look at the previous token? W_pos W_Q W_K^T W_pos^T, or its rotary equivalent."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.repeated import repeated_tokens
from hooklens.model.config import Learned, Sinusoidal
from hooklens.model.embed import rotary_tables, rotate
from hooklens.model.linear import is_plain, packed_linears
from hooklens.plugins.heads.composition import read_by
from hooklens.result import Result, Table

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

PerHead = Float[Tensor, "layer head"]


@dataclass(frozen=True, eq=False)
class PositionScores(Result):
    """The score that each query position gives each key position through positions alone, and where its maximum lies.

    `scores` is `[layer head query key]`, up to `n_pos` positions. `share` is the share of rows p >= 1 whose maximum
    over keys 0..p lies at p - 1; `chance` what random scores would give. A previous-token head by position needs, for
    every p, w_p W_Q W_K^T w_{p-1}^T > w_p W_Q W_K^T w_j^T for every other j <= p.
    """

    scores: Float[Tensor, "layer head query_pos key_pos"]
    how: str

    @property
    def share(self) -> PerHead:
        """The share of rows whose causal maximum is the previous position; ties are shared out evenly."""
        n = self.scores.shape[-1]
        causal = torch.ones(n, n, dtype=torch.bool, device=self.scores.device).tril()
        seen = self.scores.masked_fill(~causal, -torch.inf)
        best = seen == seen.amax(-1, keepdim=True)
        hit = best.diagonal(offset=-1, dim1=-2, dim2=-1).to(seen)
        return (hit / best[..., 1:, :].sum(-1)).mean(-1)

    @property
    def chance(self) -> float:
        """The mean of 1 / (p + 1) over rows."""
        n = self.scores.shape[-1]
        return float((1 / torch.arange(2, n + 1, dtype=torch.float64)).mean())

    @property
    def margin(self) -> PerHead:
        """The score of the previous position minus the best of the others, mean over rows, in softmax nats."""
        n = self.scores.shape[-1]
        causal = torch.ones(n, n, dtype=torch.bool, device=self.scores.device).tril()
        others = causal & ~torch.eye(n, dtype=torch.bool, device=causal.device).roll(-1, 1).tril()
        rest = self.scores.masked_fill(~others, -torch.inf)[..., 1:, :].amax(-1)
        return (self.scores.diagonal(offset=-1, dim1=-2, dim2=-1) - rest).mean(-1)

    def order(self) -> list[tuple[int, int]]:
        """Every (layer, head), the largest share first, then the largest margin."""
        key = self.share.double() * 1e6 + self.margin.double().clamp(-1e5, 1e5)
        return [divmod(i, self.share.shape[1]) for i in key.flatten().argsort(descending=True, stable=True).tolist()]

    def top(self, k: int = 10) -> Table:
        """The `k` heads that positions drive most to the previous token."""
        return self.table(k)

    def table(self, n: int | None = 12) -> Table:
        """One row a head: the share of rows, and the margin."""
        share, margin = self.share, self.margin
        rows = [(f"L{i}H{j}", float(share[i, j]), float(margin[i, j])) for i, j in self.order()[:n]]
        return Table(("head", f"rows with maximum at p - 1 (chance {self.chance:.3f})", "margin"), rows)

    def figure(self) -> Any:
        """The score by position of the head that positions drive most, causal part only."""
        from hooklens.viz.figures import heatmap

        layer, head = self.order()[0]
        n = self.scores.shape[-1]
        later = ~torch.ones(n, n, dtype=torch.bool, device=self.scores.device).tril()
        shown = self.scores[layer, head].masked_fill(later, torch.nan)
        middle = shown.nanmean(-1, keepdim=True)
        return heatmap(
            shown - middle,
            title=f"L{layer}H{head}: {self.how}, row mean taken away",
            x_title="key position",
            y_title="query position",
            colourbar="score",
        )


def position_scores(model: "HookedTransformer", *, n_pos: int = 32, n: int = 8, seed: int = 0) -> PositionScores:
    """What would each head look at if only positions told tokens apart?

    Learned or sinusoidal positions: the matrix W_pos W_Q W_K^T W_pos^T over the score scale, position vectors read
    through the norm's weight (its scale, the biases and a soft cap left out). Rotary positions: the queries and keys
    of `n` random sequences, each head's averaged over tokens and positions but the first, then turned by their
    angles; the kernel then depends on the distance alone, so that the share of rows is near 1 where distance 1 scores
    highest and near 0 elsewhere.

    >>> from hooklens.testing import induction_model
    >>> position_scores(induction_model()).share[0, 0].item()
    1.0

    Reference: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits" (positional QK circuit).
    """
    n_pos = min(n_pos, model.cfg.n_ctx)
    if n_pos < 2:
        raise InputError(f"a previous position needs two positions, got n_pos {n_pos} (n_ctx {model.cfg.n_ctx})")
    with torch.no_grad():
        if isinstance(model.cfg.positional_embedding_type, Learned | Sinusoidal):
            layers = [_from_table(model, layer, n_pos) for layer in range(model.cfg.n_layers)]
            return PositionScores(torch.stack(layers), "W_pos W_Q W_K^T W_pos^T")
        if any(model.cfg.rotary_at(layer) is None for layer in range(model.cfg.n_layers)):
            raise InputError("positions alone were asked for, and this model has layers without a position signal")
        return PositionScores(_from_rotary(model, n_pos, n, seed), "rotary kernel of mean query and key")


def _from_table(model: "HookedTransformer", layer: int, n_pos: int) -> Float[Tensor, "head query_pos key_pos"]:
    block = model.blocks[layer]
    if model.cfg.qk_norm is not None or not (is_plain(block.attn.q) and is_plain(block.attn.k)):
        raise InputError(
            f"W_Q W_K^T of layer {layer} was asked for, and its queries are normalised or its linear layers wrapped; "
            "head_scores measures the attention itself"
        )
    attn, w = block.attn, model.W_pos[:n_pos].to(model.dtype)
    q, k = w @ read_by(block, attn.W_Q), w @ read_by(block, attn.W_K)
    return q @ k.repeat_interleave(len(q) // len(k), 0).mT / attn.scale


def _from_rotary(
    model: "HookedTransformer", n_pos: int, n: int, seed: int
) -> Float[Tensor, "layer head query_pos key_pos"]:
    tokens = repeated_tokens(model, n, seed=seed).tokens
    with packed_linears(rows=1024):
        _, cache = model.run_with_cache(tokens, ["q", "k"], stop_at_layer=model.cfg.n_layers)
    out, positions = [], torch.arange(n_pos, device=tokens.device)
    for layer, block in enumerate(model.blocks):
        attn, made = block.attn, model.cfg.rotary_at(layer)
        assert made is not None  # looked at by the caller
        acts = [cache[name, layer] for name in "qk"]
        if attn.q_norm is not None:
            acts = [norm(act) for norm, act in zip((attn.q_norm, attn.k_norm), acts, strict=True)]
        means = [act[:, 1:].mean((0, 1)).expand(1, n_pos, -1, -1) for act in acts]
        tables = rotary_tables(made, attn.d_head, positions, acts[0].dtype)
        q, k = (rotate(x, *tables, made.interleaved)[0].transpose(0, 1) for x in means)
        out.append(q @ k.repeat_interleave(len(q) // len(k), 0).mT / attn.scale)
    return torch.stack(out)


def demo(model: "HookedTransformer") -> PositionScores:
    """Eight positions of any model whose every layer has a position signal."""
    return position_scores(model, n_pos=8, n=4)
