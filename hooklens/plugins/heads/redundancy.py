"""Redundant and complementary heads: joint ablation compared with the sum of single ablations."""

from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.component import head_name
from hooklens.core.errors import InputError
from hooklens.core.progress_bar import progress
from hooklens.data.repeated import repeated_tokens
from hooklens.model.ids import as_ids
from hooklens.model.linear import packed_linears
from hooklens.plugins.heads.mediation import without, written_z
from hooklens.plugins.heads.which import Heads, refuse_dropout
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, q_values, sign_flip_p
from hooklens.sweeps.many_edits import Edits, Hooks, Index, by_edit
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.nodes import read_heads
from hooklens.sweeps.replacement import Mean, Value

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

    ranked_by = "how far the pair is from adding up"

    terms = {
        "CKA shuffled": "the control: the CKA of the same outputs with tokens shuffled",
    }

    heads: list[str]
    joint: Float[Tensor, "sequence chosen chosen"]
    cosine: Square
    cka: Square
    cka_shuffled: Square
    base_per_sequence: Float[Tensor, "sequence"]

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


def measure_redundancy(
    model: "HookedTransformer",
    tokens: Int[Tensor, "sequence pos"],
    metric: Any,
    heads: Heads,
    *,
    value: Value = "mean over positions",
    seed: int = 0,
) -> Redundancy:
    """Which of these heads are redundant, and which complementary? Every head and every pair is ablated, exactly.

    `value` is what is written in place of an ablated head's z, as in `hl.ablate`: its mean over all positions of the
    prompts, or `hl.Mean(reference=prompts)` by position. Choose the heads on other sequences than those given here.

    >>> from hooklens.testing import or_gate
    >>> gate = or_gate()                              # two heads; either one is enough
    >>> zero = torch.zeros(1, 1, dtype=torch.long)
    >>> found = measure_redundancy(gate, zero, lambda logits: logits[:, -1, 1], [(0, 0), (0, 1)])
    >>> found.interaction[0, 0, 1].item()             # the mean of a constant is that constant: nothing is ablated
    0.0

    Reference: Wang et al. (2022), "Interpretability in the Wild", section 3.4 (backup heads); Kornblith et al. (2019),
    "Similarity of Neural Network Representations Revisited", equation 3 (linear CKA).
    """
    refuse_dropout(model)
    tokens, chosen = as_ids(tokens, device=model.device), read_heads(model, heads)
    if len(chosen) < 2:
        raise InputError(f"heads are compared in pairs, so give at least two; got {heads!r:.80}")
    return _redundancy(model, tokens, metric=metric, chosen=chosen, value=value, seed=seed)


def _redundancy(
    model: "HookedTransformer",
    tokens: Tensor,
    metric: Any,
    chosen: list[tuple[int, int]],
    value: Value,
    seed: int,
) -> Redundancy:
    with torch.no_grad(), packed_linears(rows=1024):
        stream, cache = model.run_with_cache(tokens, "z", stop_at_layer=model.cfg.n_layers)
        base = Reader(model, metric, stream).base
        new = written_z(model, tokens, cache, value)
        n = len(chosen)
        first, second = torch.triu_indices(n, n)
        runs = [
            partial(_without, new=new, heads={chosen[i], chosen[j]})
            for i, j in zip(first.tolist(), second.tolist(), strict=True)
        ]
        edits = Edits(len(runs), lambda index: by_edit(index, runs), min(layer for layer, _ in chosen))
        with progress("ablating pairs", len(runs) * len(tokens), unit="prompts") as advance:
            fall = base - edits.values(model, tokens, metric, advance)
        joint = fall.new_zeros(len(tokens), n, n)
        joint[:, first, second] = joint[:, second, first] = fall.T
        written = _outputs(model, cache, chosen)
    cka, shuffled = _cka(written), _cka(written, _shuffles(written, seed))
    return Redundancy(
        heads=[head_name(a, b) for a, b in chosen],
        joint=joint,
        cosine=_cosine(written),
        cka=cka,
        cka_shuffled=shuffled,
        base_per_sequence=base,
    )


def _without(rows: Index, new: dict[str, Tensor], heads: set[tuple[int, int]]) -> Hooks:
    """A hook a head."""
    return [without(rows, new, head) for head in sorted(heads)]


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
    # a model of one head has no pair to show, which a user is told and a demo is not
    return _redundancy(model, text.tokens, metric=text.metric(), chosen=list(heads), value=Mean(others.tokens), seed=0)
