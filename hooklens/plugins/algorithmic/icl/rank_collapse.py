"""Rank collapse: does attention make all positions equal, and do residual connections and MLPs prevent it?"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import real, whole
from hooklens.core.errors import InputError
from hooklens.data.demo_prompts import demo_texts
from hooklens.model.config import VectorEmbed
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.plugins.algorithmic.icl.scored_vectors import Inputs, read_inputs
from hooklens.results.result import Result, Table

Matrices = Float[Tensor, "*matrix pos d_model"]

#: Which parts run: the residual connection of attention, and the MLP with its own. Without both, attention alone.
VARIANTS = {
    "attention": (False, False),
    "attention + MLP": (False, True),
    "attention + residual": (True, False),
    "attention + residual + MLP": (True, True),
}


@dataclass(frozen=True, eq=False)
class RankCollapse(Result):
    """|res(X)| / |X| after each layer (0: the input), averaged over inputs, with parts of the model switched off.

    The norm is sqrt(|X|_1 |X|_inf), the geometric mean of the largest column sum and the largest row sum of |X|. 0
    means that all positions are equal. `residual` is |res(X)| itself.
    """

    terms = {name: f"the share that differs between positions, in a pass with {name} alone" for name in VARIANTS}

    variants: list[str]
    share: Float[Tensor, "variant layer"]
    residual: Float[Tensor, "variant layer"]

    def table(self, n: int | None = None) -> Table:
        """One row a layer."""
        rows = [(layer, *values) for layer, values in enumerate(self.share.T.tolist())]
        return Table(("layer", *self.variants), rows).head(n)

    def figure(self) -> Any:
        """The share that differs between positions against depth, on a logarithmic axis."""
        from hooklens.viz.curves import lines

        values = dict(zip(self.variants, self.share, strict=True))
        return lines(values, x_title="layer", y_title="|res(X)| / |X|", log="y", title="Rank collapse")


def residual_to_rank_one(x: Matrices) -> Matrices:
    """res(X) = X - 1 m^T for the row m closest to all rows, their mean: the closest matrix of equal rows is 1 m^T.

    >>> residual_to_rank_one(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    tensor([[-1.,  0.],
            [ 1.,  0.]])

    Reference: Dong et al. (2021), who define it by a minimum of a norm; here that is the Frobenius norm.
    """
    return x - x.mean(-2, keepdim=True)


def composite_norm(x: Matrices) -> Float[Tensor, "*matrix"]:
    """sqrt(|X|_1 |X|_inf) with the operator norms: the largest absolute column sum and row sum.

    >>> composite_norm(torch.tensor([[3.0, -1.0], [1.0, 0.0]]))
    tensor(4.)

    It is not a norm: the triangle inequality can fail. Reference: Dong et al. (2021).
    """
    return x.abs().sum(-2).amax(-1).sqrt() * x.abs().sum(-1).amax(-1).sqrt()


def collapse_bound(
    residual: float, beta: float, d_head: int, depth: int, *, n_heads: int = 1, gamma: float = 1.0
) -> float:
    """(4 gamma beta H / sqrt(d_head))^((3^L - 1) / 2) |res(X)|^(3^L), the published bound of pure attention.

    beta bounds |W_QK|_1 |W_V|_1,inf of every head and layer. The published gamma depends on the attention entries and
    is not computed here. The bound falls doubly exponentially if 4 gamma beta H |res(X)|^2 < sqrt(d_head); otherwise
    it grows, and says nothing.

    >>> [round(collapse_bound(0.5, 0.5, 4, depth), 6) for depth in (0, 1, 2)]
    [0.5, 0.125, 0.001953]

    Reference: Dong et al. (2021), the theorems on one head and on several heads.
    """
    power = 3.0 ** min(whole("depth", depth), 600)  # 3^L overflows, and the bound is 0 or cut off long before
    base = 4 * real("gamma", gamma, 0.0) * real("beta", beta, 0.0) * whole("n_heads", n_heads, 1)
    base /= math.sqrt(whole("d_head", d_head, 1))
    residual = real("residual", residual, 0.0)
    if residual == 0 or (base == 0 and depth):
        return 0.0
    half = math.log(base) / 2 if depth else 0.0
    exponent = power * (half + math.log(residual)) - half
    return math.exp(min(exponent, 700.0))


def measure_rank_collapse(model: HookedTransformer, tokens: Inputs) -> RankCollapse:
    """How much do positions still differ after each layer, without attention's residual connection, MLPs, or both?

    The parts are switched off by hooks: without the residual connection `resid_mid` is `attn_out`; without MLPs
    `resid_post` is `resid_mid`. An MLP that runs keeps its own residual connection. Norms stay where the model has
    them.

    >>> from hooklens.testing import tiny_model
    >>> collapse = measure_rank_collapse(tiny_model(n_layers=4), torch.arange(8)[None])
    >>> bool(collapse.share[0, -1] < collapse.share[3, -1])
    True

    With a causal mask the first position sees itself alone and collapse is slower than the theorem's, which has no
    mask. Reference: Dong et al. (2021), section 4.1 and figure 2. As in the authors' code for BERT and XLNet, only
    attention loses its residual connection, and an MLP that is left out becomes the identity with its own. In blocks
    with both side by side there is one connection, and "attention + MLP" is their sum.
    """
    need_hooked(model, "rank collapse")
    model.blocks[0].need_steps("rank collapse")
    model.blocks[0].need_sum("rank collapse")
    tokens = read_inputs(model, tokens)
    if len(tokens.shape) < 2 or tokens.shape[1] < 2:
        raise InputError(f"rank collapse compares positions, and needs at least 2; got inputs {list(tokens.shape)}")
    shares, residuals, names = [], [], []
    wide = torch.promote_types(model.dtype, torch.float32)  # sums over positions overflow in float16
    for name, (residual, mlp) in VARIANTS.items():
        if mlp and model.cfg.attn_only:
            continue
        streams = _streams(model, tokens, residual, mlp).to(wide)
        if not bool(streams.isfinite().all()):
            raise InputError(
                f"with {name} alone some activations are not finite; give inputs without NaN, and use model.float() if "
                "a model in 16 bits overflows"
            )
        left, size = composite_norm(residual_to_rank_one(streams)), composite_norm(streams)
        names.append(name)
        residuals.append(left.mean(1))
        shares.append((left / size.where(size > 0, 1.0)).mean(1))  # a stream of 0 has equal positions
    return RankCollapse(names, torch.stack(shares), torch.stack(residuals))


def _streams(
    model: HookedTransformer, tokens: Tensor, residual: bool, mlp: bool
) -> Float[Tensor, "layer batch pos d_model"]:
    """The stream before the first layer and after each, with parts of the pass switched off."""
    written: dict[str, Tensor] = {}
    streams: list[Tensor] = []
    serial = any(name.endswith("hook_resid_mid") for name in model.hook_names())

    def keep(act: Tensor, hook: Any) -> None:
        written[hook.name.rpartition("hook_")[2]] = act

    def after_attention(act: Tensor, hook: Any) -> Tensor:
        written["mid"] = written["attn_out"] + written["resid_pre"] if residual else written["attn_out"]
        return written["mid"]

    def after_block(act: Tensor, hook: Any) -> Tensor:
        mid = written["mid"] if serial else after_attention(act, hook)
        new = mid + written["mlp_out"] if mlp else mid
        streams.append(new)
        return new

    points = ["resid_pre", "attn_out"] + ["mlp_out"] * (not model.cfg.attn_only)
    hooks = [(points, keep), *([("resid_mid", after_attention)] if serial else []), ("resid_post", after_block)]
    with torch.no_grad():
        first = model(tokens, stop_at_layer=0)
        with model.hooks(fwd_hooks=hooks):
            model(tokens, stop_at_layer=model.cfg.n_layers)
    return torch.stack([first, *streams])


def demo(model: HookedTransformer) -> RankCollapse:
    """Two random inputs of up to 8 positions."""
    n = min(8, model.cfg.n_ctx)
    if isinstance(model.cfg.embed, VectorEmbed):
        drawn = torch.randn(2, n, model.cfg.embed.d_in, generator=torch.Generator().manual_seed(0))
        return measure_rank_collapse(model, drawn.to(model.device, model.dtype))
    return measure_rank_collapse(model, demo_texts(model, 2, n))
