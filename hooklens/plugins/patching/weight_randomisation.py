"""The weight-randomisation check: an attribution that survives scrambled weights says nothing about the weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.core.arguments import seeded, whole
from hooklens.core.component import layer_name
from hooklens.model.transformer import HookedTransformer
from hooklens.results.result import Result, Table
from hooklens.results.statistics import rank_correlation

PerToken = Float[Tensor, "prompt pos"]


@dataclass(frozen=True, eq=False)
class WeightRandomisation(Result):
    """Rank correlations with the original attribution, prompt by prompt, as weights are scrambled from the top down.

    `absolute` compares sizes only: a method that merely marks where inputs are large keeps them in order. With n tokens
    a correlation of unrelated attributions has mean 0 and standard deviation 1 / sqrt(n - 1). Tokens to which neither
    gives anything are left out; NaN where fewer than two are left, or all are equal.
    """

    scrambled: list[str]
    signed: Float[Tensor, "stage prompt"]
    absolute: Float[Tensor, "stage prompt"]
    n_tokens: int

    @property
    def chance(self) -> float:
        """The standard deviation of one prompt's correlation between unrelated attributions."""
        return (self.n_tokens - 1) ** -0.5 if self.n_tokens > 1 else float("nan")

    def table(self, n: int | None = None) -> Table:
        """A row a stage: mean over prompts of both correlations."""
        parts = (self.signed.nanmean(1).tolist(), self.absolute.nanmean(1).tolist())
        return Table(("scrambled", "signed", "absolute"), list(zip(self.scrambled, *parts, strict=True))).head(n)

    def figure(self) -> Any:
        """Both correlations, mean over prompts, by how much is scrambled."""
        from hooklens.viz.curves import lines

        start = torch.ones(1, dtype=self.signed.dtype)
        both = {"signed": self.signed, "absolute": self.absolute}
        curves = {name: torch.cat([start, correlation.nanmean(1).cpu()]) for name, correlation in both.items()}
        title = f"Rank correlation with the original, scrambling down to {self.scrambled[-1]}"
        return lines(curves, None, None, title, x_title="stage (0: the model itself)", y_title="rank correlation")


def randomise(
    model: HookedTransformer,
    attribute: Callable[[HookedTransformer], PerToken],
    *,
    stages: int = 3,
    seed: int = 0,
) -> WeightRandomisation:
    """Does an attribution depend on what the model learned? Scramble its weights from the top down and compare.

    `attribute` maps a model to one number a token. On a copy, the entries of every weight are shuffled, which keeps
    their distribution: first the unembedding (where it is not the embedding itself), then block after block
    downwards. Embeddings stay, for they are the input. The attribution is taken again at `stages` points on the way.

    >>> from hooklens.testing import tiny_model
    >>> found = randomise(tiny_model(), lambda model: model.W_E[:4].detach(), stages=2)     # ignores all weights above
    >>> found.signed.mean(1).tolist()
    [1.0, 1.0]

    Reference: Adebayo et al. (2018), "Sanity Checks for Saliency Maps", section 3 (cascading randomisation).
    """
    whole("stages", stages, 1)
    original, copied = attribute(model), copy.deepcopy(model)
    parts: list[tuple[str, nn.Module]] = []
    if copied.unembed.linear.weight is not copied.embed.weight:
        parts.append(("unembedding", copied.unembed))
    parts += [(layer_name(layer), copied.blocks[layer]) for layer in reversed(range(model.cfg.n_layers))]
    stops = sorted({round(len(parts) * (i + 1) / stages) for i in range(stages)} - {0})
    generator = seeded(seed)
    scrambled: list[str] = []
    signed, absolute = [], []
    for at, (name, part) in enumerate(parts, 1):
        _scramble(part, generator)
        if at in stops:
            scrambled_attribution = attribute(copied)
            scrambled.append(name if at == 1 else f"{parts[0][0]} to {name}")
            signed.append(_correlations(original, scrambled_attribution))
            absolute.append(_correlations(original.abs(), scrambled_attribution.abs()))
    return WeightRandomisation(scrambled, torch.stack(signed), torch.stack(absolute), original.shape[1])


def _scramble(part: nn.Module, generator: torch.Generator) -> None:
    """Every parameter's entries in another order."""
    with torch.no_grad():
        for p in part.parameters():
            order = torch.randperm(p.numel(), generator=generator).to(p.device)
            p.copy_(p.flatten()[order].view_as(p))


def _correlations(a: PerToken, b: PerToken) -> Float[Tensor, "prompt"]:
    """Over the tokens to which either gives anything: a token that is no part of the input agrees for nothing."""
    correlations = []
    for x, y in zip(a, b, strict=True):
        counts = (x != 0) | (y != 0)
        correlations.append(rank_correlation(x[counts], y[counts]))
    return torch.stack(correlations)
