"""Control directions for an ablation: isotropic, distributed like the activations, or with an equal share of them."""

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.data.prompts import Pairs
from hooklens.model.transformer import HookedTransformer

NULLS = ("isotropic", "as activations lie", "as large a share")
_STEEPEST, _HALVINGS = 1e18, 120  # enough to separate eigenvalues that differ only by rounding


def second_moment(model: HookedTransformer, groups: list[Pairs], names: list[str]) -> Float[Tensor, "width width"]:
    """The mean of x x^T / |x|^2 over points, prompts and positions.

    u M u is the share of an activation's squared length along u: what ablating u removes, with every position weighted
    equally, whatever the length of its vector.
    """
    total, n = torch.zeros((), dtype=torch.float64), 0
    for group in groups:
        for rows in group.clean.split(8):
            _, cache = model.run_with_cache(rows, names=names, stop_at_layer=model.cfg.n_layers)
            for name in names:
                x = cache[name].detach().double().cpu().flatten(0, -2)
                x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-300)
                total, n = total + x.T @ x, n + len(x)
    return total / n


def share_of(moment: Float[Tensor, "width width"], directions: Float[Tensor, "*draw width"]) -> Float[Tensor, "*draw"]:
    """The share of the activations' squared length along each direction.

    >>> share_of(torch.tensor([[0.75, 0.0], [0.0, 0.25]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])).tolist()
    [0.75, 0.5]
    """
    return ((directions @ moment) * directions).sum(-1) / directions.square().sum(-1)


def random_ablations(
    moment: Float[Tensor, "width width"], direction: Float[Tensor, "width"], draws: int, seed: int
) -> Float[Tensor, "null draw width"]:
    """Random unit vectors of three kinds: isotropic, with the activations' second moments, with the direction's share.

    All are M^(a/2) g with g normal: a = 0, a = 1, and for the third kind, draw by draw, the a at which u M u equals
    that of the direction. This share increases with a from the smallest eigenvalue to the largest, so a solution
    exists.

    >>> moment = torch.diag(torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64))
    >>> drawn = random_ablations(moment, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), 5, 0)
    >>> share_of(moment, drawn[2]).round(decimals=6).tolist()
    [0.45, 0.45, 0.45, 0.45, 0.45]
    """
    values, basis = torch.linalg.eigh(moment)
    largest = float(values[-1])
    log = (values.clamp_min(1e-12 * largest) / largest).log()  # 0 for the largest eigenvalue: its powers stay exact
    generator = seeded(seed)
    g = torch.randn(len(NULLS), draws, len(moment), generator=generator, dtype=torch.float64)
    matched = _exponents(log, g[2], float(share_of(moment, direction.double())) / largest)
    exponent = torch.stack([torch.zeros(draws), torch.ones(draws), matched]).double()
    sizes = (exponent[..., None] * log / 2).sub_((exponent[..., None] * log / 2).amax(-1, keepdim=True)).exp()
    drawn = (sizes * g) @ basis.T
    return drawn / drawn.norm(dim=-1, keepdim=True)


def _exponents(log: Float[Tensor, "width"], g: Float[Tensor, "draw width"], share: float) -> Float[Tensor, "draw"]:
    """Find the a at which M^(a/2) g has this share, for each draw, by bisection.

    The closer two eigenvalues are, the larger the a that separates them: a is of the order of 1 / (gap of the logs).
    """
    low, high = (g.new_full((len(g), 1), end) for end in (-_STEEPEST, _STEEPEST))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        weight = (middle * log + 2 * g.abs().log()).softmax(1)
        below = (weight @ log.exp())[:, None] < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low[:, 0]
