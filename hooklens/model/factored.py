"""A matrix kept as a product of two thin ones: algebra without forming it."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError


class FactoredMatrix:
    """A @ B with a small inner dimension, such as W_V W_O of a head; leading axes are batch axes.

    >>> m = FactoredMatrix(torch.ones(4, 2), torch.ones(2, 3))
    >>> m.shape, m.AB[0].tolist(), round(float(m.norm()), 4)
    (torch.Size([4, 3]), [2.0, 2.0, 2.0], 6.9282)
    """

    def __init__(self, A: Float[Tensor, "*lead left inner"], B: Float[Tensor, "*lead2 inner right"]):
        if A.shape[-1] != B.shape[-2]:
            raise InputError(f"the inner sizes of a product must agree, got {list(A.shape)} and {list(B.shape)}")
        lead = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        self.A, self.B = A.expand(*lead, -1, -1), B.expand(*lead, -1, -1)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.A.shape[:-1], self.B.shape[-1]))

    @property
    def AB(self) -> Float[Tensor, "*lead left right"]:
        """The product, formed."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "*lead inner inner"]:
        """The small product the other way round, with the same non-zero eigenvalues; needs a square AB."""
        if self.A.shape[-2] != self.B.shape[-1]:
            raise InputError(f"BA needs a square matrix, this one is {list(self.shape[-2:])}")
        return self.B @ self.A

    @property
    def T(self) -> "FactoredMatrix":
        return FactoredMatrix(self.B.mT, self.A.mT)

    def __matmul__(self, other: "Tensor | FactoredMatrix") -> "FactoredMatrix | Tensor":
        if isinstance(other, FactoredMatrix):
            return (self @ other.A) @ other.B  # type: ignore[return-value]
        if other.ndim == 1:
            return (self.A @ (self.B @ other)[..., None])[..., 0]
        return FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other: Tensor) -> "FactoredMatrix | Tensor":
        if other.ndim == 1:
            return ((other @ self.A)[..., None, :] @ self.B)[..., 0, :]
        return (self.T @ other.mT).T  # type: ignore[union-attr]

    def __mul__(self, scalar: int | float | Tensor) -> "FactoredMatrix":
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    def __getitem__(self, index) -> "FactoredMatrix":
        """Index batch axes, then rows, then columns; every axis kept two-sided (rows and columns by slices)."""
        index = index if isinstance(index, tuple) else (index,)
        lead = self.A.ndim - 2
        batch, rows, cols = index[:lead], index[lead : lead + 1], index[lead + 1 :]
        if any(isinstance(i, int) for i in (*rows, *cols)):
            raise InputError("rows and columns of a FactoredMatrix are slices or lists; m.AB[...] gives numbers")
        A, B = self.A[batch], self.B[batch]
        A = A[..., rows[0], :] if rows else A
        return FactoredMatrix(A, B[..., cols[0]] if cols else B)

    def __iter__(self) -> Iterator["FactoredMatrix"]:
        return (self[i] for i in range(self.A.shape[0]))

    def __repr__(self) -> str:
        return f"FactoredMatrix({list(self.shape)}, inner {self.A.shape[-1]})"

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, S and V with AB = U diag(S) V^T, from QR of the thin factors: the large product is never formed."""
        Qa, Ra = torch.linalg.qr(self.A)
        Qb, Rb = torch.linalg.qr(self.B.mT)
        U, S, Vh = torch.linalg.svd(Ra @ Rb.mT, full_matrices=False)
        return Qa @ U, S, Qb @ Vh.mT

    @property
    def U(self) -> Float[Tensor, "*lead left rank"]:
        return self.svd()[0]

    @property
    def S(self) -> Float[Tensor, "*lead rank"]:
        return self.svd()[1]

    @property
    def V(self) -> Float[Tensor, "*lead right rank"]:
        return self.svd()[2]

    @property
    def eigenvalues(self) -> Tensor:
        """The non-zero eigenvalues of a square AB: those of the small BA."""
        return torch.linalg.eigvals(self.BA)

    def norm(self) -> Float[Tensor, "*lead"]:
        """The Frobenius norm, from the small Gram matrices."""
        return ((self.A.mT @ self.A) * (self.B @ self.B.mT)).sum((-2, -1)).clamp_min(0).sqrt()

    def trace(self) -> Float[Tensor, "*lead"]:
        """The trace of a square AB."""
        return self.BA.diagonal(dim1=-2, dim2=-1).sum(-1)
