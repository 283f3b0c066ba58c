"""Factors that a formula gives, and what hooklens and TransformerLens 3.9.0 are both asked of their product.

`benchmarks/record_factored.py` asks there and writes `recorded_factored.py`.
"""

import warnings

import torch
from parity import fill
from torch import Tensor

#: (leading axes, rows, inner dimension, columns)
SHAPES = {"square": ((2,), 5, 2, 5), "wide": ((2, 2), 3, 2, 4), "plain": ((), 6, 3, 6), "thick": ((), 3, 4, 3)}


def factors(name: str) -> tuple[Tensor, Tensor]:
    lead, rows, inner, columns = SHAPES[name]
    return fill(f"{name}.A", (*lead, rows, inner)), fill(f"{name}.B", (*lead, inner, columns))


def values(m) -> dict[str, Tensor]:
    """What each operation returns; where a sign is free, its absolute value."""
    lead, rows, _, columns = tuple(m.shape[:-2]), m.ldim, m.mdim, m.rdim
    right, left = fill("right", (columns, 2)), fill("left", (2, rows))
    U, S, V = m.svd()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Vh = m.Vh
    found = {
        "AB": m.AB,
        "T": m.T.AB,
        "S": S,
        "U": U.abs(),
        "V": V.abs(),
        "Vh": Vh.abs(),
        "norm": m.norm(),
        "make_even": m.make_even().AB,
        "even A": m.make_even().A.abs(),
        "collapse_l": m.collapse_l().abs(),
        "collapse_r": m.collapse_r().abs(),
        "get_corner": m.get_corner(2),
        "unsqueeze": m.unsqueeze(0).AB,
        "@ matrix": (m @ right).AB,
        "@ vector": m @ right[:, 0],
        "matrix @": (left @ m).AB,
        "vector @": left[0] @ m,
        "@ factored": (m @ m.T).AB,
        "* number": (m * 3).AB,
        "number *": (0.5 * m).AB,
        "pair": m.pair[0],
        "row": m[(*[0] * len(lead), -1)].AB,
        "entry": m[(*[0] * len(lead), 1, 2)].AB,
        "column": m[(*[0] * len(lead), slice(None), -2)].AB,
    }
    if lead:
        found["index"] = m[1].AB
    if rows == columns and m.mdim <= rows:
        parts = m.eigenvalues.flatten()
        found["BA"] = m.BA
        found["eigenvalues"] = torch.stack([parts.real.sort().values, parts.imag.sort().values])
    found["sizes"] = torch.tensor([m.ndim, m.ldim, m.mdim, m.rdim, int(m.has_leading_dims)])
    return found
