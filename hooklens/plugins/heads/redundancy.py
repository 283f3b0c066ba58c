"""Redundant and complementary heads: joint ablation compared with the sum of single ablations."""

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import InputError
from hooklens.core.progress import progress
from hooklens.data.repeated import repeated_tokens
from hooklens.model.ids import as_ids
from hooklens.model.linear import packed_linears
from hooklens.plugins.heads.mediation import mean_z, on_stream
from hooklens.plugins.heads.which import Heads, read_heads, refuse_dropout
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, q_values, sign_flip_p
from hooklens.sweeps.measure import Reader

if TYPE_CHECKING:
    from hooklens.core.cache import ActivationCache
    from hooklens.model.transformer import HookedTransformer

Square = Float[Tensor, "chosen chosen"]


@dataclass(frozen=True, eq=False)
class Redundancy(Result):
    """The decrease of the metric without each head and without each pair, and the similarity of the heads' outputs.

    `joint[s, i, j]` is the decrease without both, on the diagonal without the single head. `interaction` is joint minus
    the two single decreases. Above 0 the heads are redundant: losing both costs more than the sum. Below 0 they are
    complementary, on the same path: without one, the other is worth less. `cosine` and `cka` compare their outputs;
    `cka_shuffled` is the CKA of the same outputs with shuffled tokens, which a small number of tokens alone would give.
    """

    terms = {
        "CKA shuffled": "the control: the CKA of the same outputs with tokens shuffled",
    }

    heads: list[str]
    joint: Float[Tensor, "sequence chosen chosen"]
    cosine: Square
    cka: Square
    cka_shuffled: Square
    base: Float[Tensor, "sequence"]

    @property
    def single(self) -> Float[Tensor, "sequence chosen"]:
        """The decrease without each single head."""
        return self.joint.diagonal(dim1=1, dim2=2)

    @property
    def interaction(self) -> Float[Tensor, "sequence chosen chosen"]:
        """Joint minus single decreases; 0 on the diagonal."""
        found = self.joint - self.single[:, :, None] - self.single[:, None, :]
        own = torch.eye(len(self.heads), dtype=torch.bool, device=found.device)
        return found.masked_fill(own, 0.0)

    def _rows(self) -> list[tuple]:
        pairs = list(combinations(range(len(self.heads)), 2))
        if not pairs:
            return []
        each = torch.stack([self.interaction[:, i, j] for i, j in pairs], 1)
        (low, high), q, single = mean_interval(each), q_values(sign_flip_p(each)), self.single.mean(0)
        rows = []
        for row, (i, j) in enumerate(pairs):
            falls = (float(single[i]), float(single[j]), float(self.joint[:, i, j].mean()), float(each[:, row].mean()))
            alike = (float(self.cosine[i, j]), float(self.cka[i, j]), float(self.cka_shuffled[i, j]))
            ends = (float(low[row]), float(high[row]), float(q[row]))
            rows.append((f"{self.heads[i]} {self.heads[j]}", *falls, *ends, *alike))
        return sorted(rows, key=lambda row: -abs(row[4]))

    def top(self, k: int = 10) -> Table:
        """The `k` pairs with the largest interaction."""
        return self.table(k)

    def table(self, n: int | None = 12) -> Table:
        """One row per pair, the largest interaction first."""
        falls = ("first alone", "second alone", "both", "interaction", "95% low", "95% high", "q")
        return Table(("heads", *falls, "cosine", "CKA", "CKA shuffled"), self._rows()[:n])

    def figure(self) -> Any:
        """Pair by pair: blue if losing both costs more than the sum, orange if less."""
        from hooklens.viz.figures import heatmap

        return heatmap(
            self.interaction.mean(0),
            x=self.heads,
            y=self.heads,
            title="Joint minus single ablation: blue are redundant, orange share a path",
            colourbar="nats per token",
        )


def redundancy(
    model: "HookedTransformer",
    tokens: Int[Tensor, "sequence pos"],
    metric: Any,
    heads: Heads,
    *,
    reference: Int[Tensor, "other other_pos"] | None = None,
    seed: int = 0,
) -> Redundancy:
    """Which of these heads are redundant, and which complementary? Every head and every pair is ablated, exactly.

    Ablated heads are set to their mean z over the `reference` prompts, position by position (by default over the
    prompts' own positions). Choose the heads on other sequences than those given here.

    >>> from hooklens.testing import or_gate
    >>> gate = or_gate()                              # two heads; either one is enough
    >>> zero = torch.zeros(1, 1, dtype=torch.long)
    >>> found = redundancy(gate, zero, lambda logits: logits[:, -1, 1], [(0, 0), (0, 1)])
    >>> found.interaction[0, 0, 1].item()             # the mean of a constant is that constant: nothing is ablated
    0.0

    Reference: Wang et al. (2022), "Interpretability in the Wild", section 3.4 (backup heads); Kornblith et al. (2019),
    "Similarity of Neural Network Representations Revisited", equation 3 (linear CKA).
    """
    refuse_dropout(model)
    tokens, chosen = as_ids(tokens, device=model.device), read_heads(model, heads)
    if len(chosen) < 2:
        raise InputError(f"redundancy compares pairs of heads and needs at least two; got {heads!r:.80}")
    return _redundancy(model, tokens, metric=metric, chosen=chosen, reference=reference, seed=seed)


def _redundancy(
    model: "HookedTransformer",
    tokens: Tensor,
    metric: Any,
    chosen: list[tuple[int, int]],
    reference: Tensor | None,
    seed: int,
) -> Redundancy:
    with torch.no_grad(), packed_linears(rows=1024):
        stream, cache = model.run_with_cache(tokens, "z", stop_at_layer=model.cfg.n_layers)
        reader = Reader(model, metric, stream)
        mean = mean_z(model, cache, reference, tokens)
        n = len(chosen)
        joint = torch.zeros(len(tokens), n, n).to(reader.base)
        groups = [(i, i) for i in range(n)] + list(combinations(range(n), 2))
        with progress("ablating pairs", len(groups), unit="runs") as advance:
            for i, j in groups:
                hooks = _without(mean, {chosen[i], chosen[j]})
                out = model.run_with_hooks(tokens, fwd_hooks=hooks, stop_at_layer=model.cfg.n_layers)
                joint[:, i, j] = joint[:, j, i] = reader.base - on_stream(reader, out)
                advance()
        written = _outputs(model, cache, chosen)
    cka, shuffled = _cka(written), _cka(written, _shuffles(written, seed))
    return Redundancy(
        heads=[f"L{a}H{b}" for a, b in chosen],
        joint=joint,
        cosine=_cosine(written),
        cka=cka,
        cka_shuffled=shuffled,
        base=reader.base,
    )


def _without(mean: dict[int, Tensor], heads: set[tuple[int, int]]) -> list[tuple]:
    """One hook per head."""

    def hook_of(layer: int, head: int) -> tuple:
        def edit(z: Tensor, hook: Any) -> Tensor:
            z[:, :, head] = mean[layer][:, :, head]
            return z

        return ("z", layer), edit

    return [hook_of(layer, head) for layer, head in sorted(heads)]


def _outputs(
    model: "HookedTransformer", cache: "ActivationCache", heads: list[tuple[int, int]]
) -> Float[Tensor, "chosen token d_model"]:
    """Each head's output at every position except the first."""
    rows = []
    for layer, head in heads:
        z = cache["z", layer][:, 1:]
        rows.append(model.blocks[layer].attn.results(z)[:, :, head].flatten(0, 1))
    return torch.stack(rows)


def _cosine(x: Float[Tensor, "chosen token d_model"]) -> Square:
    """The mean over tokens of the cosine between two heads' outputs."""
    unit = x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return torch.einsum("itd,jtd->ij", unit, unit) / max(1, x.shape[1])


def _shuffles(x: Tensor, seed: int) -> Int[Tensor, "draw token"]:
    generator = seeded(seed)
    return torch.stack([torch.randperm(x.shape[1], generator=generator) for _ in range(20)]).to(x.device)


def _cka(x: Float[Tensor, "chosen token d_model"], orders: Int[Tensor, "draw token"] | None = None) -> Square:
    """Linear CKA |X^T Y|^2 / (|X^T X| |Y^T Y|) of centred outputs; of shuffled second ones, the mean over `orders`."""
    centred = x - x.mean(1, keepdim=True)
    gram = torch.einsum("itd,iud->itu", centred, centred)  # the same numbers from token by token products
    norm = gram.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    seconds = [gram] if orders is None else [gram[:, order][:, :, order] for order in orders]
    each = [torch.einsum("itu,jtu->ij", gram, second) / norm / norm[:, None] for second in seconds]
    return torch.stack(each).mean(0)


def demo(model: "HookedTransformer") -> Redundancy:
    """The first head of the first layer and some of the last, on short sequences that repeat."""
    both = repeated_tokens(model, 8, length=13)
    text, others = both.part(0, 4), both.part(4, 8)
    heads = dict.fromkeys([(0, 0), *((model.cfg.n_layers - 1, head) for head in range(min(3, model.cfg.n_heads)))])
    # a model with one head has no pair: an error for a user, but not for a demo
    return _redundancy(model, text.tokens, metric=text.metric(), chosen=list(heads), reference=others.tokens, seed=0)
