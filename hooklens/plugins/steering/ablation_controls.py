"""Directions to take out beside the one that is asked about: at random, as the stream lies, and as much of it."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.data.prompts import Pairs

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

NULLS = ("isotropic", "as activations lie", "as large a share")
_STEEPEST, _HALVINGS = 1e18, 120  # beyond what parts two eigenvalues that are equal but for rounding


def second_moment(model: "HookedTransformer", groups: list[Pairs], names: list[str]) -> Float[Tensor, "width width"]:
    """The mean of x x^T / |x|^2 over points, prompts and positions.

    u M u is then the share of an activation's squared length that lies along u: what taking u out removes, with every
    position counting the same, however long its vector.
    """
    total, seen = torch.zeros((), dtype=torch.float64), 0
    for group in groups:
        for rows in group.clean.split(8):
            _, cache = model.run_with_cache(rows, names=names, stop_at_layer=model.cfg.n_layers)
            for name in names:
                x = cache[name].detach().double().cpu().flatten(0, -2)
                x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-300)
                total, seen = total + x.T @ x, seen + len(x)
    return total / seen


def share_of(moment: Float[Tensor, "width width"], directions: Float[Tensor, "*draw width"]) -> Float[Tensor, "*draw"]:
    """The share of the activations that lies along each direction.

    >>> share_of(torch.tensor([[0.75, 0.0], [0.0, 0.25]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])).tolist()
    [0.75, 0.5]
    """
    return ((directions @ moment) * directions).sum(-1) / directions.square().sum(-1)


def random_ablations(
    moment: Float[Tensor, "width width"], direction: Float[Tensor, "width"], draws: int, seed: int
) -> Float[Tensor, "null draw width"]:
    """Unit vectors of three kinds: uniform, with the activations' second moments, and with the direction's own share.

    All are M^(a/2) g with g normal: a = 0, a = 1, and for the third kind the a, draw by draw, at which u M u is the
    direction's. That share rises with a from the smallest eigenvalue to the largest, so that there is one.

    >>> moment = torch.diag(torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64))
    >>> found = random_ablations(moment, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), 5, 0)
    >>> share_of(moment, found[2]).round(decimals=6).tolist()
    [0.45, 0.45, 0.45, 0.45, 0.45]
    """
    values, basis = torch.linalg.eigh(moment)
    largest = float(values[-1])
    log = (values.clamp_min(1e-12 * largest) / largest).log()  # 0 for the largest: steep powers of it stay exact
    generator = seeded(seed)
    g = torch.randn(len(NULLS), draws, len(moment), generator=generator, dtype=torch.float64)
    matched = _exponents(log, g[2], float(share_of(moment, direction.double())) / largest)
    exponent = torch.stack([torch.zeros(draws), torch.ones(draws), matched]).double()
    sizes = (exponent[..., None] * log / 2).sub_((exponent[..., None] * log / 2).amax(-1, keepdim=True)).exp()
    drawn = (sizes * g) @ basis.T
    return drawn / drawn.norm(dim=-1, keepdim=True)


def _exponents(log: Float[Tensor, "width"], g: Float[Tensor, "draw width"], share: float) -> Float[Tensor, "draw"]:
    """For each draw the a at which M^(a/2) g has that share, by halving.

    The closer two eigenvalues lie, the larger an a it takes to tell them apart: a is of the order of 1 / (log's gap).
    """
    low, high = (g.new_full((len(g), 1), end) for end in (-_STEEPEST, _STEEPEST))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        weight = (middle * log + 2 * g.abs().log()).softmax(1)
        below = (weight @ log.exp())[:, None] < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low[:, 0]
