"""Redundant and complementary heads: joint ablation compared with the sum of single ablations."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.cache import ActivationCache
from hooklens.core.component import head_name
from hooklens.core.errors import InputError
from hooklens.data.prompts import Prompts
from hooklens.metrics import need_metric
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.head_ranking import Head, head_table
from hooklens.plugins.heads.mediation import ablations, without, written_z
from hooklens.plugins.heads.which import Heads, captured, check_model, demo_sequences, one_length
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, q_values, sign_flip_p
from hooklens.sweeps.many_edits import Hooks, Index, run_edits
from hooklens.sweeps.nodes import read_heads
from hooklens.sweeps.replacement import Mean, Value
from hooklens.sweeps.resume import Resume, resuming

Square = Float[Tensor, "chosen chosen"]
_SHUFFLES = 20


@dataclass(frozen=True, eq=False)
class Redundancy(Result):
    """The decrease of the metric without each head and without each pair, and the similarity of the heads' outputs.

    `joint[s, i, j]` is the decrease without both, on the diagonal without the single head. `interaction` is joint minus
    the two single decreases. Above 0 the heads are redundant: losing both costs more than the sum. Below 0 they are
    complementary, on the same path: without one, the other is worth less. `cosine` and `cka` compare their outputs;
    `cka_shuffled` is the CKA of the same outputs with shuffled tokens, which a small number of tokens alone would give.
    """

    ranked_by = "how far the pair is from adding up"

    terms = {"CKA shuffled": "the control: the CKA of the same outputs with tokens shuffled"}

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
        interaction = self.joint - self.single[:, :, None] - self.single[:, None, :]
        own = torch.eye(len(self.heads), dtype=torch.bool, device=interaction.device)
        return interaction.masked_fill(own, 0.0)

    def table(self, n: int | None = 12) -> Table:
        """One row per pair, the largest interaction first."""
        first, second = torch.triu_indices(len(self.heads), len(self.heads), 1)
        interaction, single = self.interaction[:, first, second], self.single.mean(0)
        low, high = mean_interval(interaction)
        columns = {"first alone": single[first], "second alone": single[second]}
        columns |= {"both": self.joint[:, first, second].mean(0), "interaction": interaction.mean(0)}
        columns |= {"95% low": low, "95% high": high, "q": q_values(sign_flip_p(interaction))}
        alike = {"cosine": self.cosine, "CKA": self.cka, "CKA shuffled": self.cka_shuffled}
        columns |= {name: square[first, second] for name, square in alike.items()}
        pairs = [f"{self.heads[i]} {self.heads[j]}" for i, j in zip(first.tolist(), second.tolist(), strict=True)]
        return head_table(interaction.mean(0).abs(), columns, n, names=pairs, title="heads")

    def figure(self) -> Any:
        """Pair by pair: blue if losing both costs more than the sum, orange if less."""
        from hooklens.viz.figures import heatmap

        title = "Joint minus single ablation: blue are redundant, orange share a path"
        return heatmap(self.interaction.mean(0), x=self.heads, y=self.heads, title=title, colourbar="nats per token")


def measure_redundancy(
    model: HookedTransformer,
    tokens: Prompts,
    metric: Any,
    heads: Heads,
    *,
    value: Value = "mean over positions",
    seed: int = 0,
    resume: str | Path | Resume | None = None,
) -> Redundancy:
    """Which of these heads are redundant, and which complementary? Every head and every pair is ablated, exactly.

    `value` is what is written in place of an ablated head's z, as in `hl.ablate`: its mean over all positions of the
    prompts, or `hl.Mean(reference=prompts)` by position. Choose the heads on other sequences than those given here.
    `resume` names a file that keeps finished runs, as in `hl.patch`.

    >>> from hooklens.testing import or_gate
    >>> gate = or_gate()                              # two heads; either one is enough
    >>> zero = torch.zeros(1, 1, dtype=torch.long)
    >>> found = measure_redundancy(gate, zero, lambda logits: logits[:, -1, 1], [(0, 0), (0, 1)])
    >>> found.interaction[0, 0, 1].item()             # the mean of a constant is that constant: nothing is ablated
    0.0

    Reference: Wang et al. (2022), "Interpretability in the Wild", section 3.4 (backup heads); Kornblith et al. (2019),
    "Similarity of Neural Network Representations Revisited", equation 3 (linear CKA).
    """
    check_model(model, "measure_redundancy")
    need_metric(metric)
    chosen = read_heads(model, heads)
    if len(chosen) < 2:
        raise InputError(f"heads are compared in pairs, so give at least two; got {heads!r:.80}")
    tokens = one_length(model, tokens)
    n = len(chosen)
    first, second = torch.triu_indices(n, n)
    pairs = [{chosen[i], chosen[j]} for i, j in zip(first.tolist(), second.tolist(), strict=True)]
    with resuming(resume, "measure_redundancy") as file:
        _, cache = captured(model, tokens, "z")
        new = written_z(model, tokens, cache, value)
        runs = [partial(_without, new=new, heads=pair) for pair in pairs]
        edits = ablations("pairs", runs, chosen, value=value, written=new)
        (outcome,) = run_edits(model, [(edits, tokens, metric)], title="ablating pairs", resume=file)
        fall = outcome.base - outcome.values
        joint = fall.new_zeros(len(tokens), n, n)
        joint[:, first, second] = joint[:, second, first] = fall.T
        written = _outputs(model, cache, chosen)
    return Redundancy(
        heads=[head_name(layer, head) for layer, head in chosen],
        joint=joint,
        cosine=_cosine(written),
        cka=_cka(written),
        cka_shuffled=_cka(written, _shuffles(written, seed)),
        base_per_sequence=outcome.base,
    )


def _without(rows: Index, new: dict[str, Tensor], heads: set[Head]) -> Hooks:
    """One hook per head."""
    return [without(rows, new, head) for head in sorted(heads)]


def _outputs(
    model: HookedTransformer, cache: ActivationCache, heads: list[Head]
) -> Float[Tensor, "chosen token d_model"]:
    """Each head's output at every position except the first."""
    layers = {layer: model.blocks[layer].attn.results(cache["z", layer][:, 1:]) for layer in {at[0] for at in heads}}
    return torch.stack([layers[layer][:, :, head].flatten(0, 1) for layer, head in heads])


def _cosine(x: Float[Tensor, "chosen token d_model"]) -> Square:
    """The mean over tokens of the cosine between two heads' outputs."""
    unit = x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return torch.einsum("itd,jtd->ij", unit, unit) / max(1, x.shape[1])


def _shuffles(x: Tensor, seed: int) -> Int[Tensor, "draw token"]:
    generator = seeded(seed)
    return torch.stack([torch.randperm(x.shape[1], generator=generator) for _ in range(_SHUFFLES)]).to(x.device)


def _cka(x: Float[Tensor, "chosen token d_model"], orders: Int[Tensor, "draw token"] | None = None) -> Square:
    """Linear CKA |X^T Y|^2 / (|X^T X| |Y^T Y|) of centred outputs; of shuffled second ones, the mean over `orders`."""
    centred = x - x.mean(1, keepdim=True)
    gram = torch.einsum("itd,iud->itu", centred, centred)  # the same numbers from token by token products
    norm = gram.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    seconds = [gram] if orders is None else [gram[:, order][:, :, order] for order in orders]
    return torch.stack([torch.einsum("itu,jtu->ij", gram, second) / norm / norm[:, None] for second in seconds]).mean(0)


def demo(model: HookedTransformer) -> Redundancy | Needs:
    """The first head of the first layer and some of the last, on short sequences that repeat."""
    tokens, metric, others = demo_sequences(model)
    heads = dict.fromkeys([(0, 0), *((model.cfg.n_layers - 1, head) for head in range(min(3, model.cfg.n_heads)))])
    if len(heads) < 2:
        return Needs("two heads")
    return measure_redundancy(model, tokens, metric, list(heads), value=Mean(others))
