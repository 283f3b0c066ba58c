"""A product of thin factors against the dense matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.core.errors import InputError
from hooklens.model.factored import FactoredMatrix


def made(lead, left, inner, right, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(*lead, left, inner, generator=generator, dtype=torch.float64)
    return FactoredMatrix(A, torch.randn(*lead, inner, right, generator=generator, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2), n=st.integers(1, 6), inner=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_every_operation_equals_the_dense_one(lead, n, inner, seed):
    m, other = made(lead, n, inner, n, seed), made(lead, n, inner, n, seed + 1)
    dense, x = m.AB, other.AB
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)  # noqa: E731
    close((m @ x).AB, dense @ x)
    close((x @ m).AB, x @ dense)
    close((m @ other).AB, dense @ other.AB)
    close(m @ x[..., 0].reshape(-1, n)[0], dense @ x[..., 0].reshape(-1, n)[0])
    close(x[..., 0].reshape(-1, n)[0] @ m, x[..., 0].reshape(-1, n)[0] @ dense)
    close(m.T.AB, dense.mT)
    close((2 * m).AB, 2 * dense)
    close((m * 2).AB, 2 * dense)
    close(m.norm(), torch.linalg.matrix_norm(dense))
    close(m.trace(), dense.diagonal(dim1=-2, dim2=-1).sum(-1))
    close((m.U * m.S[..., None, :]) @ m.V.mT, dense)
    close(m.S, torch.linalg.svdvals(dense)[..., : m.S.shape[-1]])
    own = torch.linalg.eigvals(dense)
    for value in m.eigenvalues.flatten():  # each is one of the dense matrix's, or a zero that rank allows
        assert min((own - value).abs().min(), value.abs()) < 1e-6
    assert m.shape == dense.shape


def test_indexing_takes_batch_axes_then_rows_then_columns():
    m = made((2, 3), 5, 2, 4)
    assert torch.equal(m[1].AB, m.AB[1]) and torch.equal(m[1, 2].AB, m.AB[1, 2])
    assert torch.allclose(m[0, 1, 1:3].AB, m.AB[0, 1, 1:3]) and torch.allclose(
        m[0, 1, :, [0, 2]].AB, m.AB[0, 1][:, [0, 2]]
    )
    assert [part.shape for part in m] == [m[0].shape] * 2
    with pytest.raises(InputError, match="slices or lists"):
        _ = m[0, 1, 2]


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises((InputError, TypeError)):  # or the executed annotation before it
        FactoredMatrix(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(InputError, match="needs a square matrix"):
        _ = made((), 3, 2, 4).BA
