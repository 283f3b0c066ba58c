"""The null model of a head's score: the same head with randomly rotated queries or values.

A rotation of the d_head dimensions between W_Q and W_K (or W_V and W_O) preserves what the head reads and writes and
how strongly, but destroys which input goes with which output. A freshly initialised head and its rotation have the same
distribution, so p-values are exact there.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.cache import ActivationCache
from hooklens.core.errors import InputError
from hooklens.core.progress_bar import tracked
from hooklens.model.kv_cache import Context
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.head_ranking import PerHead
from hooklens.results.statistics import PValues

Mask = Bool[Tensor, "sequence query_pos key_pos"]
DRAWS = 100  # with the draws of all heads pooled, the smallest p-value is below 0.05 / (4 kinds x heads)
_AT_ONCE = 2**22  # numbers in the largest tensor of a chunk of draws


def haar(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "draw d d"]:
    """`n` random orthogonal matrices (rotations and reflections), uniform over orientations.

    >>> R = haar(2, 3, torch.Generator().manual_seed(0))
    >>> torch.allclose(R @ R.mT, torch.eye(3, dtype=R.dtype).expand(2, 3, 3))
    True

    Reference: Mezzadri (2007), "How to generate random matrices from the classical compact groups", section 5.
    """
    Q, R = torch.linalg.qr(torch.randn(n, d, d, generator=generator, dtype=torch.float64))
    return Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None]


def query_rotations(n: int, heads: int, d: int, generator: torch.Generator) -> Float[Tensor, "draw head d d"]:
    """One rotation per draw, with rows shuffled and signs flipped separately for each head: as random as new ones."""
    base = haar(n, d, generator)
    order = torch.rand(n, heads, d, generator=generator).argsort(-1)
    signs = torch.randint(2, (n, heads, d, 1), generator=generator) * 2.0 - 1
    return base[torch.arange(n)[:, None, None], order] * signs


def mass(pattern: Float[Tensor, "*lead sequence head query_pos key_pos"], mask: Mask) -> Tensor:
    """The attention on the marked keys, mean over the queries that have one; NaN for a sequence without any.

    >>> float(mass(torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]]), torch.tensor([[[False, False], [True, False]]])))
    0.25
    """
    queries = mask.any(-1).sum(-1)  # [sequence]
    on = torch.einsum("...shqk,sqk->...sh", pattern, mask.to(pattern))
    return on / torch.where(queries > 0, queries, torch.nan).to(pattern)[:, None]


def rotated_masses(
    model: HookedTransformer, cache: ActivationCache, masks: Mapping[str, Mask], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Float[Tensor, "draw layer head"]]:
    """Each head's mean `mass` over sequences with rotated queries; the cache contains q and k."""
    whole("draws", draws, 2)
    layers, cfg = [], model.cfg
    for layer in tracked(range(cfg.n_layers), "rotating queries", "layers"):
        turns = query_rotations(draws, cfg.n_heads, cfg.d_head, seeded(seed, layer, stride=1_000_003))
        layers.append(_of_layer(model, cache, masks, layer=layer, turns=turns))
    return {name: torch.stack([scores[name] for scores in layers], 1) for name in masks}


def _of_layer(
    model: HookedTransformer,
    cache: ActivationCache,
    masks: Mapping[str, Mask],
    layer: int,
    turns: Float[Tensor, "draw head d d"],
) -> dict[str, Float[Tensor, "draw head"]]:
    attn, q, k = model.blocks[layer].attn, cache["q", layer], cache["k", layer]
    n, pos, heads, d = q.shape
    at_once = max(1, _AT_ONCE // (n * pos * heads * max(pos, d)))
    ctx = Context(torch.arange(pos, device=q.device))
    masses: dict[str, list[Tensor]] = {name: [] for name in masks}
    for some in turns.to(q).split(at_once):
        turned = torch.einsum("sphd,thde->tsphe", q, some).flatten(0, 1)
        keys = k.expand(len(some), *k.shape).flatten(0, 1)
        scores = attn.scores(*attn.place(turned, keys, ctx), ctx.view(attn.mask))
        pattern = attn.score.pattern(scores, None).unflatten(0, (len(some), n))
        for name, mask in masks.items():
            masses[name].append(mass(pattern, mask).nanmean(1))
    return {name: torch.cat(parts) for name, parts in masses.items()}


def pooled_p(value: PerHead, null: Float[Tensor, "draw layer head"]) -> PValues:
    """How often a rotated head lies as far above its own mean as this head does, in standard deviations; never 0.

    Each head is standardised by the mean and deviation of its own rotations (of signed square roots, which are less
    skewed), then compared with those of all heads together. A head that no rotation changes gets 1.

    >>> null = torch.randn(200, 1, 4, generator=torch.Generator().manual_seed(0)).abs()
    >>> pooled_p(torch.tensor([[0.5, 9.0, 0.5, 0.5]]), null)[0, 1].item() < 0.01
    True

    Reference: Tusher, Tibshirani and Chu (2001), "Significance analysis of microarrays" (pooled permutations).
    """
    if len(null) < 2:
        raise InputError(f"a null needs at least two draws, got {len(null)}")
    # signed square roots keep the order of shares, and their spread depends less on their size
    root, roots = ((x.sign() * x.abs().sqrt()).double() for x in (value, null))
    middle, spread = roots.mean(0), roots.std(0)
    moves = spread > 1e-6 * (1e-6 + roots.abs().amax(0))  # smaller is rounding: a head without queries, or one token
    safe = torch.where(moves & ~root.isnan(), spread, torch.nan)
    return above((root - middle) / safe, (roots - middle) / safe)


def above(value: Float[Tensor, "*cell"], null: Float[Tensor, "*drawn"]) -> PValues:
    """The share of the pooled null that reaches each value, counting the value itself; 1 where a value is NaN.

    >>> above(torch.tensor([0.5, 3.0]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])).tolist()
    [0.6, 0.2]
    """
    pool = null[~null.isnan()].sort().values
    reached = len(pool) - torch.searchsorted(pool, value.nan_to_num(-torch.inf).contiguous())
    return torch.where(value.isnan(), 1.0, (reached + 1).double() / (len(pool) + 1))
