"""A product of thin factors against the dense matrix."""

import pytest
import torch
from close import close
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_factored import factors, values
from recorded_factored import RECORDED

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
    assert close(m[1].AB, m.AB[1]) and close(m[1, 2].AB, m.AB[1, 2])
    assert torch.allclose(m[0, 1, 1:3].AB, m.AB[0, 1, 1:3]) and torch.allclose(
        m[0, 1, :, [0, 2]].AB, m.AB[0, 1][:, [0, 2]]
    )
    assert [part.shape for part in m] == [m[0].shape] * 2
    for row, column in ((2, 3), (-1, -4), (0, 0)):
        assert torch.allclose(m[0, 1, row].AB, m.AB[0, 1, row][None])
        assert torch.allclose(m[0, 1, row, column].AB, m.AB[0, 1, row, column][None, None])
        assert torch.allclose(m[:, 1, :, column].AB, m.AB[:, 1, :, column][..., None])
    assert close(m[None, 1].AB, m.AB[None, 1])
    for wrong in ((0, 1, 5), (0, 1, 0, -5), (0, 1, 0, 0, 0), (..., 0)):
        with pytest.raises(InputError, match=r"asked for|does not fit"):
            _ = m[wrong]


@settings(max_examples=25, deadline=None)
@given(lead=st.lists(st.integers(1, 3), max_size=2), sizes=st.tuples(*[st.integers(1, 6)] * 3), seed=st.integers(0, 99))
def test_other_forms_are_the_same_product(lead, sizes, seed):
    """Also where the inner dimension is the largest one."""
    m = made(lead, *sizes, seed)
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)  # noqa: E731
    U, S, V = m.svd()
    close(m.make_even().AB, m.AB)
    close(m.make_even().A.mT @ m.make_even().A, torch.diag_embed(S))
    close(U @ m.collapse_l(), m.AB)
    close(m.collapse_r() @ V.mT, m.AB)
    close(m.get_corner(2), m.AB[tuple([slice(2)] * m.ndim)])
    close(m.unsqueeze(0).AB, m.AB[None])
    close(m.unsqueeze(-3).AB, m.AB.unsqueeze(-3))
    assert (m.ndim, m.ldim, m.mdim, m.rdim) == (len(lead) + 2, *sizes)


@pytest.mark.parametrize("name", RECORDED)
def test_values_equal_transformer_lens(name):
    ours = values(FactoredMatrix(*factors(name)))
    assert list(ours) == list(RECORDED[name])
    for what, expected in RECORDED[name].items():
        shape, numbers = expected
        assert tuple(ours[what].shape) == shape, what
        assert ours[what].flatten().tolist() == pytest.approx(numbers, abs=1e-5), what


def test_vh_is_v_as_in_transformer_lens_and_says_so():
    m = made((), 4, 2, 3)
    with pytest.warns(DeprecationWarning, match="not transposed"):
        assert torch.equal(m.Vh, m.V)


def test_a_tensor_that_is_no_number_does_not_multiply():
    with pytest.raises(InputError, match="needs a single number"):
        _ = made((), 3, 2, 3) * torch.ones(3)
    with pytest.raises(InputError, match="adds a batch axis"):
        made((), 3, 2, 3).unsqueeze(-1)


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises((InputError, TypeError)):  # or the executed annotation before it
        FactoredMatrix(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(InputError, match="needs a square matrix"):
        _ = made((), 3, 2, 4).BA
    assert not hasattr(made((), 3, 2, 4), "eigenvalues") and hasattr(made((), 3, 2, 3), "eigenvalues")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_of_factors_that_nearly_cancel_keeps_its_digits(dtype):
    """Half were lost in a sum over Gram matrices: its error was sqrt(eps) |A| |B|, that of the product is eps."""
    generator = torch.Generator().manual_seed(0)
    column, row = torch.randn(64, 1, generator=generator), torch.randn(1, 64, generator=generator)
    A = torch.cat([column * 30, column * 30 + 1e-4 * torch.randn(64, 1, generator=generator)], 1).to(dtype)
    B = torch.cat([row * 30, -row * 30], 0).to(dtype)
    expected = torch.linalg.matrix_norm(A.double() @ B.double()).item()
    rounding = torch.finfo(dtype).eps * float(A.norm() * B.norm())
    assert FactoredMatrix(A, B).norm().item() == pytest.approx(expected, abs=2 * rounding)
    half = FactoredMatrix(A.bfloat16(), B.bfloat16()).norm()
    assert half.dtype == torch.bfloat16 and half.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_decomposed_as_exactly_as_their_numbers_in_float64(dtype):
    """svd, S and make_even raised; eigenvalues were those of a product rounded to 8 or 11 bits."""
    half = made((3,), 24, 4, 24)
    half = FactoredMatrix(half.A.to(dtype), half.B.to(dtype))
    exact = FactoredMatrix(half.A.double(), half.B.double())
    size = float(exact.S.max())
    bound = {"atol": 32 * torch.finfo(torch.float32).eps * size, "rtol": 0.0, "check_dtype": False}
    torch.testing.assert_close(half.S, exact.S, **bound)
    U, S, V = half.svd()
    torch.testing.assert_close(U @ torch.diag_embed(S) @ V.mT, exact.AB, **bound)
    torch.testing.assert_close(half.make_even().AB, exact.AB, **bound)
    torch.testing.assert_close(half.collapse_l().norm(dim=(1, 2)), exact.norm(), **bound)
    torch.testing.assert_close(half.collapse_r().norm(dim=(1, 2)), exact.norm(), **bound)
    ours, theirs = (torch.view_as_real(m.eigenvalues).double() for m in (half, exact))
    apart = (ours[:, :, None] - theirs[:, None]).norm(dim=-1)  # each has its neighbour in the other, in some order
    assert apart.amin(1).max() < bound["atol"] and apart.amin(2).max() < bound["atol"]
    rounding = torch.finfo(dtype).eps * exact.trace().abs()
    assert bool(((half.trace() - exact.trace()).abs() <= rounding + bound["atol"]).all())
    assert half.trace().dtype == half.norm().dtype == dtype


def test_the_rank_is_at_most_each_of_the_three_sizes_of_which_mdim_is_the_inner_one():
    wide = FactoredMatrix(torch.ones(2, 6), torch.ones(6, 3))
    assert (wide.ldim, wide.mdim, wide.rdim) == (2, 6, 3) and wide.S.shape[-1] == 2
    assert "at most the minimum" in FactoredMatrix.mdim.__doc__
