"""Points on the plane in two classes that no straight line separates."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded, whole

Points = Float[Tensor, "row 2"]
Classes = Int[Tensor, "row"]


def rings(n: int, *, seed: int = 0) -> tuple[Points, Classes]:
    """A disc of radius 0.4 (class 0) inside a ring from 0.6 to 0.95 (class 1), each with uniform density.

    >>> x, y = rings(100)
    >>> bool((x[y == 0].norm(dim=1) <= 0.4).all()), bool((x[y == 1].norm(dim=1) >= 0.6).all())
    (True, True)
    """
    whole("n", n, 2)
    y = torch.arange(n) % 2
    angle, share = torch.rand(2, n, generator=seeded(seed), dtype=torch.float64)
    inner, outer = (torch.tensor(ends, dtype=torch.float64)[y] for ends in ([0.0, 0.6], [0.4, 0.95]))
    radius = (inner**2 + share * (outer**2 - inner**2)).sqrt()  # area grows with the square of the radius
    angle = 2 * torch.pi * angle
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), y


def quadrants(n: int, *, seed: int = 0) -> tuple[Points, Classes]:
    """Uniform on the square [-1, 1]^2; class 1 where the coordinates have different signs (exclusive or).

    >>> x, y = quadrants(100)
    >>> bool(((x[:, 0] * x[:, 1] < 0) == (y == 1)).all())
    True
    """
    x = 2 * torch.rand(whole("n", n, 2), 2, generator=seeded(seed), dtype=torch.float64) - 1
    return x, (x[:, 0] * x[:, 1] < 0).long()
