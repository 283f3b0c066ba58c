"""Measurements of name movers with a known answer."""

import torch

from hooklens.plugins.heads.mover_result import Criteria, NameMovers


def demo_movers(n: int = 8, heads: int = 2) -> NameMovers:
    """Synthetic measurements in which L0H0 is a name mover."""
    noise = torch.randn(n, 1, heads, generator=torch.Generator().manual_seed(0)) * 0.02
    is_mover = torch.tensor([1.0] + [0.0] * (heads - 1))
    return NameMovers(
        attention=0.6 * is_mover + noise.abs(),
        margin=0.5 * is_mover + noise,
        rank=(90 * (1 - is_mover)).long().expand(3, 1, heads).clone(),
        written=torch.eye(3)[:, None, None] * is_mover[:, None],
        direct=0.3 * is_mover + noise,
        placebo=noise.flip(0),
        gap=torch.ones(n),
        name=torch.arange(n) % 3,
        group=torch.arange(n),
        d_vocab=100,
        criteria=Criteria(),
    )
