"""Cross-validation of a difference of means, and its null distribution under shuffled labels."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import InputError
from hooklens.results.statistics import auc, group_numbers

_FOLDS = 5
Acts = Float[Tensor, "layer prompt width"]
Signs = Float[Tensor, "draw prompt"]


@dataclass(frozen=True)
class Split:
    """Positive prompts, then negative ones: the folds, and how labels may be shuffled."""

    n_positive: int
    n_negative: int
    group: Int[Tensor, "prompt"]
    folds: list[Bool[Tensor, "prompt"]]
    paired: bool

    def labels(self) -> Float[Tensor, "prompt"]:
        """1 for positive, -1 for negative prompts."""
        return torch.cat([torch.ones(self.n_positive), -torch.ones(self.n_negative)]).double()

    def shuffled(self, draws: int, generator: torch.Generator) -> Signs:
        """Shuffled labels: swapped within the pairs of a group, or permuted if there are no pairs."""
        label = self.labels()
        if self.paired:
            n = int(self.group.max()) + 1
            flips = torch.randint(2, (draws, n), generator=generator).double() * 2 - 1
            return label * flips[:, self.group]
        return torch.stack([label[torch.randperm(len(label), generator=generator)] for _ in range(draws)])


class Separation(NamedTuple):
    """The result of `cross_fit`: see `ContrastDirections`."""

    separation: Float[Tensor, "layer"]
    gap: Float[Tensor, "layer"]
    null: Float[Tensor, "draw layer"]
    shuffled: Float[Tensor, "kept layer width"]
    score: Float[Tensor, "layer prompt"]


def make_splits(n_positive: int, n_negative: int, group: Int[Tensor, "pair"] | None, seed: int) -> Split:
    """Folds over groups of pairs, or over single prompts if the two kinds differ in number.

    >>> split = make_splits(3, 3, None, 0)
    >>> split.paired, len(split.folds), bool(sum(fold.long() for fold in split.folds).eq(1).all())
    (True, 3, True)
    """
    generator, paired = seeded(seed), n_positive == n_negative
    if group is not None and not paired:
        raise InputError(
            f"group has one label per pair, but {n_positive} positive and {n_negative} negative prompts make no pairs"
        )
    if paired:
        number = group_numbers(n_positive, group).repeat(2)
        n_groups = int(number.max()) + 1
        n_folds = min(_FOLDS, n_groups)
        fold = (torch.randperm(n_groups, generator=generator).argsort() % n_folds)[number]
    else:
        number, n_folds = torch.arange(n_positive + n_negative), min(_FOLDS, n_positive, n_negative)
        fold = torch.cat([torch.randperm(n, generator=generator) % n_folds for n in (n_positive, n_negative)])
    if n_folds < 2:
        raise InputError(
            f"a held-out test needs at least two independent prompts of each kind, got {n_positive} positive and "
            f"{n_negative} negative in {int(number.max()) + 1} groups"
        )
    return Split(n_positive, n_negative, number, [fold == i for i in range(n_folds)], paired)


def cross_fit(acts: Acts, split: Split, draws: int, seed: int, *, keep: int) -> Separation:
    """The held-out separation with the actual labels and with shuffled labels.

    A direction is a weighted sum of activations, so every projection follows from their Gram matrix. A draw costs the
    number of prompts squared, whatever the width.
    """
    wide = acts.double()
    wide = wide - wide.mean(1, keepdim=True)  # this changes no compared projection, and it avoids cancellation
    gram = wide @ wide.mT
    signs = split.shuffled(draws, seeded(seed, 1))
    label = split.labels()[None]
    score = _held_out(gram, label, split.folds)[:, 0]
    null = torch.cat([_separation(_held_out(gram, some, split.folds), some) for some in signs.split(32)], 1)
    positive = split.labels() > 0
    gap = score[:, positive].mean(1) - score[:, ~positive].mean(1)
    drawn = torch.einsum("kn,lnd->kld", _weights(signs[:keep], torch.ones(len(positive), dtype=torch.bool)), wide)
    parts = _separation(score[:, None], label)[:, 0], gap, null.T, drawn, score
    return Separation(*(part.to(acts) for part in parts))


def _separation(score: Float[Tensor, "layer draw prompt"], signs: Signs) -> Float[Tensor, "layer draw"]:
    """The probability that a positive prompt scores above a negative one."""
    return torch.stack([auc(score[:, i], sign > 0) for i, sign in enumerate(signs)], 1)


def _held_out(
    gram: Float[Tensor, "layer prompt prompt"], signs: Signs, folds: list[Bool[Tensor, "prompt"]]
) -> Float[Tensor, "layer draw prompt"]:
    """Each prompt's coordinate along the direction of the other folds: 0 is midway, 1 the distance of the means."""
    score = gram.new_zeros(len(gram), *signs.shape)
    for fold in folds:
        weight = _weights(signs, ~fold)  # the direction, as weights of activations
        middle = weight.abs() / 2  # halfway between its means
        along = weight @ gram  # layer draw prompt
        size = (along * weight).sum(-1, keepdim=True)
        offset = (along * middle).sum(-1, keepdim=True)
        score[..., fold] = ((along - offset) / size.clamp_min(torch.finfo(size.dtype).tiny))[..., fold]
    return score


def _weights(signs: Signs, rows: Bool[Tensor, "prompt"]) -> Signs:
    """The weights of these rows whose sum is the difference of means."""
    kept = signs * rows
    above, below = kept.clamp_min(0), kept.clamp_max(0)
    return above / above.sum(1, keepdim=True).clamp_min(1) + below / -below.sum(1, keepdim=True).clamp_max(-1)
