"""A matrix kept as a product of two thin factors: algebra without forming the product."""

import warnings
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import Absent, InputError, OutOfRange
from hooklens.core.precision import widened


class FactoredMatrix:
    """A @ B with a small inner dimension, such as W_V W_O of a head; leading axes are batch axes.

    >>> m = FactoredMatrix(torch.ones(4, 2), torch.ones(2, 3))
    >>> m.shape, m.AB[0].tolist(), round(float(m.norm()), 4)
    (torch.Size([4, 3]), [2.0, 2.0, 2.0], 6.9282)

    Names and values are those of TransformerLens 3's class. Each use of `U`, `S` or `V` computes a decomposition: get
    all three from `svd()`. Decompositions of half-precision factors are computed and returned in float32.
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
    def ndim(self) -> int:
        return self.A.ndim

    @property
    def ldim(self) -> int:
        """The number of rows of the product."""
        return self.A.shape[-2]

    @property
    def mdim(self) -> int:
        """The inner dimension. The product's rank is at most the minimum of `ldim`, `mdim` and `rdim`."""
        return self.A.shape[-1]

    @property
    def rdim(self) -> int:
        """The number of columns of the product."""
        return self.B.shape[-1]

    @property
    def has_leading_dims(self) -> bool:
        return self.ndim > 2

    @property
    def pair(self) -> tuple[Float[Tensor, "*lead left inner"], Float[Tensor, "*lead inner right"]]:
        """Both factors."""
        return self.A, self.B

    @property
    def AB(self) -> Float[Tensor, "*lead left right"]:
        """The product as a full matrix."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "*lead inner inner"]:
        """The small product in the other order, with the same non-zero eigenvalues; needs a square AB."""
        if self.A.shape[-2] != self.B.shape[-1]:
            raise Absent(f"BA needs a square matrix, but this one is {list(self.shape[-2:])}")
        return self.B @ self.A

    @property
    def T(self) -> "FactoredMatrix":
        return FactoredMatrix(self.B.mT, self.A.mT)

    def __matmul__(self, other: "Tensor | FactoredMatrix") -> "FactoredMatrix | Tensor":
        if isinstance(other, FactoredMatrix):
            return FactoredMatrix(self.A, self.B @ other.A @ other.B)
        if other.ndim == 1:
            return (self.A @ (self.B @ other)[..., None])[..., 0]
        return FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other: Tensor) -> "FactoredMatrix | Tensor":
        if other.ndim == 1:
            return ((other @ self.A)[..., None, :] @ self.B)[..., 0, :]
        return FactoredMatrix(other @ self.A, self.B)

    def __mul__(self, scalar: int | float | Tensor) -> "FactoredMatrix":
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise InputError(
                f"* needs a single number, got a tensor {list(scalar.shape)}; products of matrices are m @ other"
            )
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    def __getitem__(self, index) -> "FactoredMatrix":
        """Index batch axes, then rows, then columns; the last two remain axes, an integer selects one of size 1."""
        index = index if isinstance(index, tuple) else (index,)
        given, lead = sum(i is not None for i in index), self.ndim - 2
        if given > self.ndim or any(i is Ellipsis for i in index):
            raise InputError(
                f"the index {index} does not fit a FactoredMatrix {list(self.shape)}; give batch axes, rows, columns"
            )
        inner = given - lead  # how many of the last two axes are indexed
        batch = index if inner <= 0 else index[: len(index) - inner]
        rows, cols = (*index[len(batch) :], slice(None), slice(None))[:2]
        try:
            A, B = self.A[batch], self.B[batch]
            return FactoredMatrix(A[..., _kept(rows, self.ldim), :], B[..., _kept(cols, self.rdim)])
        except IndexError as error:
            raise OutOfRange(f"the index {index} does not fit a FactoredMatrix {list(self.shape)}: {error}") from error

    def __iter__(self) -> Iterator["FactoredMatrix"]:
        return (self[i] for i in range(self.A.shape[0]))

    def __repr__(self) -> str:
        return f"FactoredMatrix({list(self.shape)}, inner {self.A.shape[-1]})"

    def _wide(self) -> tuple[Float[Tensor, "*lead left inner"], Float[Tensor, "*lead inner right"]]:
        return widened(self.A), widened(self.B)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, S and V with AB = U diag(S) V^T, from QR of the thin factors; the large product is never formed."""
        A, B = self._wide()
        Qa, Ra = torch.linalg.qr(A)
        Qb, Rb = torch.linalg.qr(B.mT)
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
    def Vh(self) -> Float[Tensor, "*lead right rank"]:
        """V, under TransformerLens's name: it is not transposed there either, and warns."""
        warnings.warn(
            "Vh is V, not transposed, as in TransformerLens; use V, or V.mT", DeprecationWarning, stacklevel=2
        )
        return self.V

    @property
    def eigenvalues(self) -> Tensor:
        """The non-zero eigenvalues of a square AB: those of the small BA."""
        return torch.linalg.eigvals(FactoredMatrix(*self._wide()).BA)

    def make_even(self) -> "FactoredMatrix":
        """The same product with the singular values split evenly: U sqrt(S) and sqrt(S) V^T."""
        U, S, V = self.svd()
        root = S.sqrt()
        return FactoredMatrix(U * root[..., None, :], root[..., :, None] * V.mT)

    def collapse_l(self) -> Float[Tensor, "*lead rank right"]:
        """S V^T: the product without the rotation U on its left, with the same norms and Gram matrix of columns."""
        _, S, V = self.svd()
        return S[..., :, None] * V.mT

    def collapse_r(self) -> Float[Tensor, "*lead left rank"]:
        """U S: the product without the rotation V on its right."""
        U, S, _ = self.svd()
        return U * S[..., None, :]

    def get_corner(self, k: int = 3) -> Tensor:
        """The first `k` entries along every axis of the product, for inspection."""
        corner = (slice(k),) * (self.ndim - 2)
        return self.A[corner][..., :k, :] @ self.B[corner][..., :, :k]

    def unsqueeze(self, k: int) -> "FactoredMatrix":
        """Insert a batch axis of size 1 at `k`."""
        if not 0 <= (k + self.ndim + 1 if k < 0 else k) <= self.ndim - 2:
            raise InputError(f"unsqueeze adds a batch axis, at 0 to {self.ndim - 2} of {list(self.shape)}, got {k}")
        return FactoredMatrix(self.A.unsqueeze(k), self.B.unsqueeze(k))

    def norm(self) -> Float[Tensor, "*lead"]:
        """The Frobenius norm: that of A R^T with B^T = Q R, which avoids cancellation."""
        A, B = self._wide()
        _, R = torch.linalg.qr(B.mT)
        return (A @ R.mT).norm(dim=(-2, -1)).to(self.A)

    def trace(self) -> Float[Tensor, "*lead"]:
        """The trace of a square AB."""
        return FactoredMatrix(*self._wide()).BA.diagonal(dim1=-2, dim2=-1).sum(-1).to(self.A)


def _kept(index: int | slice | list | Tensor, size: int) -> slice | list | Tensor:
    """An index that keeps its axis."""
    if not isinstance(index, int):
        return index
    if not -size <= index < size:
        raise InputError(f"row or column {index} asked for; this FactoredMatrix has 0 to {size - 1} of them")
    return slice(index % size, index % size + 1)
