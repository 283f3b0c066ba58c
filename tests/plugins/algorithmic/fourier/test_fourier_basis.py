"""The Fourier basis modulo p against torch's transform, for prime, composite, even and the smallest p."""

import pytest
import torch
from refused import refused

from hooklens.core.errors import InputError
from hooklens.plugins.algorithmic.fourier import (
    component_names,
    distinguished,
    fourier_basis,
    frequency_power,
    frequency_power_2d,
    gini,
    inverse_2d,
    inverse_participation_ratio,
    keep_frequencies,
    keep_single_frequencies,
    mean_by_sum,
    sums,
    transform,
    transform_2d,
)
from hooklens.plugins.algorithmic.fourier.basis import checked_frequencies

MODULI = [2, 3, 4, 5, 6, 7, 9, 12, 31]


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("p", MODULI)
def test_the_basis_is_orthonormal_and_keeps_sums_of_squares(p):
    basis = fourier_basis(p)
    assert torch.allclose(basis @ basis.T, torch.eye(p, dtype=torch.float64), atol=1e-13)
    assert len(component_names(p)) == p
    values = drawn(p, p, 2)
    assert torch.allclose(transform_2d(values).square().sum((0, 1)), values.square().sum((0, 1)))
    assert torch.allclose(inverse_2d(transform_2d(values)), values, atol=1e-12)


@pytest.mark.parametrize("p", MODULI)
def test_power_by_frequency_is_that_of_the_complex_transform(p):
    values = drawn(p, 3)
    complex_power = torch.fft.fft(values, dim=0).abs().square() / p
    for k in range(1, p // 2 + 1):
        terms = {k, p - k}
        assert torch.allclose(frequency_power(values)[k - 1], sum(complex_power[i] for i in terms))


@pytest.mark.parametrize("p", MODULI)
def test_power_of_single_frequencies_in_two_dimensions(p):
    values = drawn(p, p, 2)
    complex_power = torch.fft.fft2(values, dim=(0, 1)).abs().square() / p**2
    for k in {1, p // 2}:
        single = {0, k, p - k}
        expected = sum(complex_power[i, j] for i in single for j in single if (i, j) != (0, 0))
        assert torch.allclose(frequency_power_2d(values)[k - 1], expected)
        kept = keep_single_frequencies(values, [k])
        assert torch.allclose(kept.square().sum((0, 1)), expected)
        assert torch.allclose(keep_single_frequencies(kept, [k]), kept, atol=1e-12)
        assert keep_single_frequencies(values - kept, [k]).abs().max() < 1e-12


def test_what_is_kept_of_several_frequencies_is_the_sum():
    values = drawn(11, 11, 2)
    both = keep_single_frequencies(values, [2, 5])
    assert torch.allclose(both, keep_single_frequencies(values, [2]) + keep_single_frequencies(values, [5]))


@pytest.mark.parametrize("p", MODULI)
def test_functions_of_the_sum(p):
    values = drawn(p, 2)
    assert torch.allclose(mean_by_sum(values[sums(p)]), values)
    every = range(1, p // 2 + 1)
    assert torch.allclose(keep_frequencies(values, every), values - values.mean(0), atol=1e-12)
    assert keep_frequencies(values, []).abs().max() == 0
    assert torch.allclose(transform(values)[0], values.sum(0) / p**0.5)


@pytest.mark.parametrize(
    ("p", "frequencies"), [(12, [4]), (12, [4, 3]), (12, [6]), (9, [3]), (7, [2]), (2, [1]), (10, [5, 2])]
)
def test_how_many_answers_waves_tell_apart_is_the_number_of_different_values(p, frequencies):
    rows = [row for k in frequencies for row in fourier_basis(p)[2 * k - 1 : 2 * k + 1]]
    values = {tuple(round(float(row[n]), 9) + 0.0 for row in rows) for n in range(p)}
    assert distinguished(p, frequencies) == len(values)


@pytest.mark.parametrize("given", [[0], [4], [1.0], [True], [], "1", None])
def test_frequencies_that_are_none_are_refused(given):
    with pytest.raises(InputError, match="frequencies"):
        checked_frequencies(given, 7)
    assert checked_frequencies(torch.tensor([3, 1, 3]), 7) == [1, 3]
    assert checked_frequencies(range(1, 3), 7) == [1, 2]


def test_parts_of_frequencies_that_are_none_are_refused():
    """A repeat counted twice, 9 of p = 7 gave 0, and whole numbers became a basis of zeros."""
    wave = torch.cos(2 * torch.pi / 7 * sums(7).double())
    assert torch.allclose(keep_single_frequencies(wave, [1, 1]), wave)
    for keep, values in ((keep_frequencies, wave[0]), (keep_single_frequencies, wave)):
        for given in ([0], [-1], [9], [1.5]):
            with refused(InputError, "frequencies are whole numbers from 1 to p // 2 = 3"):
                keep(values, given)
    with refused(InputError, "numbers with a point"):
        transform(torch.ones(4, dtype=torch.long))


def test_half_precision_overflowed_and_rounded_in_sums():
    wave = 100 * torch.cos(2 * torch.pi / 113 * 3 * torch.arange(113))
    assert float(frequency_power(wave.half())[2]) == pytest.approx(113 / 2 * 1e4, rel=1e-3)  # it was infinite
    assert bool((mean_by_sum(torch.full((113, 113), 1000.0).half()) == 1000).all())
    grid = torch.full((113, 113), 1000.0).half()
    assert float(transform_2d(grid)[0, 0]) == pytest.approx(113_000) and inverse_2d(grid).isfinite().all()
    assert float(gini(torch.arange(1, 3000).half())) == pytest.approx(1 / 3, abs=1e-3)
    assert float(inverse_participation_ratio(torch.full((3000,), 300.0).half())) == pytest.approx(1 / 3000)


def test_frequencies_and_values_that_are_none_failed_inside_torch():
    wave = torch.cos(2 * torch.pi / 7 * torch.arange(7).double())
    for given in (None, 1.0, "1"):
        with refused(InputError, "frequencies"):
            keep_frequencies(wave, given)
    assert torch.allclose(keep_frequencies(wave, torch.tensor(1)), wave)
    assert not keep_frequencies(wave, torch.tensor([])).any()
    for values in ([1.0, 2.0], None):
        with refused(InputError, "values are a tensor"):
            transform(values)
