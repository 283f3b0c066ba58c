"""Does a head write the token it attends to, or its opposite? The OV circuit from tokens to logits."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.errors import InputError
from hooklens.core.precision import widened
from hooklens.core.progress_bar import tracked
from hooklens.data.prompts import need_tokens
from hooklens.data.repeated import repeated_tokens
from hooklens.model.linear import matrix_of, packed_linears
from hooklens.model.norms import Passage
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.head_ranking import Head, PerHead, head_map, head_table, ranked
from hooklens.plugins.heads.rotations import DRAWS, above, query_rotations
from hooklens.plugins.heads.which import check_model
from hooklens.plugins.weights.needs import Needs, needs_tokens
from hooklens.results.result import Result, Table
from hooklens.results.statistics import q_values
from hooklens.sweeps.naive import not_finite

Columns = Float[Tensor, "head d_head token"]
_ROWS = 16  # tokens per sequence


@dataclass(frozen=True, eq=False)
class Copying(Result):
    """How each head's OV maps a sample of tokens to their own logits.

    `own` is the logit that a token gives itself through a head, minus the mean logit that it gives the sampled tokens
    (without the norms' scales, so only its sign and rank are comparable between heads). `rank` is the token's rank
    among the sampled ones, 0 the first; ties get the middle rank. `positive` is the sum of the circuit's eigenvalues
    over the sum of their absolute values: 1 if the head copies every token, -1 if it writes every token's opposite. `z`
    is the mean of `own` in standard deviations of the same head with randomly rotated values; `copies` and `suppresses`
    are the p-values.
    """

    ranked_by = "how much the OV circuit copies or suppresses"

    tokens: Int[Tensor, "token"]
    own: Float[Tensor, "token layer head"]
    rank: Float[Tensor, "token layer head"]
    positive: PerHead
    z: PerHead
    copies: PerHead
    suppresses: PerHead

    def top_share(self, k: int = 5) -> PerHead:
        """The share of tokens that are among the `k` tokens their own OV raises most."""
        return (self.rank < k).to(self.own).mean(0)

    def bottom_share(self, k: int = 5) -> PerHead:
        """The share of tokens that are among the `k` tokens their own OV lowers most."""
        return (self.rank >= len(self.tokens) - k).to(self.own).mean(0)

    def order(self) -> list[Head]:
        """Every (layer, head), the one farthest from chance first."""
        return ranked(self.z.abs())

    def table(self, n: int | None = 12) -> Table:
        """One row per head: eigenvalue score, shares of tokens at the top and bottom, deviation and q-values."""
        copies, suppresses = q_values(torch.stack([self.copies, self.suppresses]))
        columns = {"eigenvalues": self.positive, "own in top 5": self.top_share(), "in bottom 5": self.bottom_share()}
        columns |= {"z": self.z, "q copies": copies, "q suppresses": suppresses}
        return head_table(self.z.abs(), columns, n)

    def figure(self) -> Any:
        """How far each head's copying is from chance, in standard deviations of rotated heads."""
        return head_map(self.z, "OV copying against rotated heads", "z")


def score_copying(model: HookedTransformer, *, n_tokens: int = 256, draws: int = DRAWS, seed: int = 0) -> Copying:
    """Which heads would write the token they attend to, wherever they attend? Uses weights only, no attention.

    A sample of tokens is passed through each head's values and output, the final norm's weight and W_U. For layer 0 the
    input is the embedding, for later layers the output of block 0 on random text. The scales of norms are left out
    (they are positive, so ranks are unchanged).

    >>> from hooklens.testing import induction_model
    >>> found = score_copying(induction_model())
    >>> found.positive[1, 1].item(), found.top_share(1)[1, 1].item(), found.rank[0, 0, 0].item()
    (1.0, 1.0, 5.0)

    Reference: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", "Detecting copying behavior".
    """
    check_model(model, "score_copying")
    need_tokens(model, "score_copying", "hl.heads.measure_mediation follows what a head writes")
    model.blocks[0].need_sum("a head's direct path to the logits")
    draws, n_tokens = whole("draws", draws, 1), whole("n_tokens", n_tokens, 1)
    tokens, streams = _streams(model, n_tokens, seed)
    layers: list[dict[str, Tensor]] = []
    with torch.no_grad(), packed_linears(rows=1024):
        columns = logit_columns(model, tokens)
        for layer in tracked(range(model.cfg.n_layers), "what heads copy", "layers"):
            block = model.blocks[layer]
            read = widened(values_of(model, layer, streams[min(layer, 1)])).transpose(0, 1)
            written = widened(block.writes_through("attn").unscaled(block.attn.output_matrix()) @ columns)
            if (seen := not_finite(read, written)) is not None:  # LAPACK would end the process
                raise InputError(f"the OV circuits of layer {layer} are {seen}, so that they have no eigenvalues")
            layers.append(_of_layer(read, written, draws, seeded(seed, layer, stride=1_000_003)))
    own, rank, null = (torch.stack([result[name] for result in layers], 1) for name in ("own", "rank", "null"))
    positive, z = (torch.stack([result[name] for result in layers]) for name in ("positive", "z"))
    copies, suppresses = above(z, null), above(-z, -null)
    return Copying(tokens=tokens, own=own, rank=rank, positive=positive, z=z, copies=copies, suppresses=suppresses)


def _streams(
    model: HookedTransformer, n_tokens: int, seed: int
) -> tuple[Int[Tensor, "token"], list[Float[Tensor, "token d_model"]]]:
    """Sampled tokens; their embeddings, and their mean output of block 0 over the places where they were drawn."""
    per_row = repeated_tokens(model, 1, length=2 * _ROWS + 1, seed=seed).first_query - 1
    text = repeated_tokens(model, -(-n_tokens // per_row), length=2 * per_row + 1, period=per_row, seed=seed)
    rows = text.tokens[:, : per_row + 1]
    with torch.no_grad():
        _, cache = model.run_with_cache(rows, ["embed", ("resid_post", 0)], stop_at_layer=1)
    tokens, which = rows[:, 1:].flatten()[:n_tokens].unique(return_inverse=True)
    acts = [cache[name][:, 1:].flatten(0, 1)[:n_tokens] for name in ("hook_embed", "blocks.0.hook_resid_post")]
    count = torch.bincount(which)[:, None]
    return tokens, [act.new_zeros(len(tokens), act.shape[1]).index_add_(0, which, act) / count for act in acts]


def values_of(
    model: HookedTransformer, layer: int, x: Float[Tensor, "token d_model"]
) -> Float[Tensor, "token head d_head"]:
    """Each head's values for these streams, without biases; heads of a group share values."""
    block, attn = model.blocks[layer], model.blocks[layer].attn
    normed = block.before_attn(x)[:, None]
    v = attn.heads(attn.v, normed, None) - attn.heads(attn.v, torch.zeros_like(normed), None)
    return v[:, 0].repeat_interleave(attn.n_heads // attn.n_kv_heads, 1)


def logit_columns(model: HookedTransformer, tokens: Int[Tensor, "token"]) -> Float[Tensor, "d_model token"]:
    """The final norm's weight and W_U of these tokens: how what is added to the stream changes their logits."""
    W_U = matrix_of(model.unembed.linear, model.cfg.d_model)
    return Passage(model.ln_final).folded(W_U[tokens].mT)


def _of_layer(
    read: Float[Tensor, "head token d_head"], columns: Columns, draws: int, generator: torch.Generator
) -> dict[str, Tensor]:
    logits = read @ columns  # [head token token]: row i is what token i writes
    own = logits.diagonal(dim1=1, dim2=2)
    rank = ((logits > own[..., None]).sum(-1) + (logits >= own[..., None]).sum(-1) - 1) / 2
    eigenvalues = torch.linalg.eigvals(columns @ read)  # the non-zero ones of `logits`
    size = eigenvalues.abs().sum(-1)
    # The mean of `own` is the inner product of the identity with G; for a rotated head it is that of R with G.
    G = (read.mT @ (columns - columns.mean(-1, keepdim=True)).mT).double()
    heads, d = G.shape[:2]
    deviation = G.flatten(1).norm(dim=1) / d**0.5  # of <R, G> over random rotations, whose mean is 0
    safe = torch.where(deviation > 0, deviation, torch.nan)
    turned = torch.einsum("thde,hde->th", query_rotations(draws, heads, d, generator).to(G), G)
    return {
        "own": (own - logits.mean(-1)).T,
        "rank": rank.T.to(read),
        "positive": torch.where(size > 0, eigenvalues.real.sum(-1) / size, 0.0),
        "z": (G.diagonal(dim1=1, dim2=2).sum(-1) / safe).to(read),
        "null": (turned / safe).to(read),
    }


def demo(model: HookedTransformer) -> Copying | Needs:
    """32 tokens through every head."""
    return needs_tokens(model) or score_copying(model, n_tokens=32, draws=50)
