"""Spectra: known ranks, full numerical rank at initialisation, against dense decompositions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.zoo import ZOO, vector_model, zoo_model

import hooklens as hl
from hooklens.plugins.weights.spectrum import effective_rank, measure_spectrum, numerical_rank, participation_ratio
from hooklens.testing import tiny_model


@settings(max_examples=15, deadline=None)
@given(d_vocab=st.integers(2, 40), d_head=st.integers(1, 6), heads=st.integers(1, 3), seed=st.integers(0, 99))
def test_at_initialisation_the_numerical_rank_is_the_smaller_side(d_vocab, d_head, heads, seed):
    d_model = d_head * heads
    found = measure_spectrum(tiny_model(d_vocab=d_vocab, d_model=d_model, n_heads=heads, n_layers=1), seed=seed)
    for name, (rows, columns) in {"W_E": (d_vocab, d_model), "W_U": (d_model, d_vocab), "W_pos": (32, d_model)}.items():
        one = found.embeddings[name]
        assert one.shape == (rows, columns) and one.initial_rank.item() == min(rows, columns)
        assert 1 <= one.initial_effective <= min(rows, columns) + 1e-4
    for one in (found.QK, found.OV):
        assert (one.initial_rank == min(d_head, d_model)).all()


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 8), zeros=st.integers(0, 4), scale=st.floats(0.1, 100))
def test_k_equal_singular_values_count_as_k(k, zeros, scale):
    s = torch.cat([torch.full((k,), scale, dtype=torch.float64), torch.zeros(zeros, dtype=torch.float64)])
    assert effective_rank(s).item() == pytest.approx(k) and participation_ratio(s).item() == pytest.approx(k)
    assert numerical_rank(s, (12, 12), 2e-16).item() == k


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(0.01, 10), min_size=1, max_size=8))
def test_effective_ranks_lie_between_1_and_the_rank_and_large_values_weigh_more_in_the_ratio(values):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    assert 1 - 1e-9 <= participation_ratio(s) <= effective_rank(s) + 1e-9 <= len(values) + 1e-8


@pytest.mark.parametrize("name", sorted(ZOO))
def test_singular_values_are_those_of_the_dense_matrices(name):
    model = zoo_model(name, dtype=torch.float64)
    found = measure_spectrum(model)
    dense = {"W_E": model.W_E, "W_U": model.W_U, **({} if model.pos_embed is None else {"W_pos": model.W_pos})}
    assert set(found.embeddings) == set(dense)
    for key, matrix in dense.items():
        expected = torch.linalg.svdvals(matrix.detach().double())
        torch.testing.assert_close(found.embeddings[key].singular.double(), expected, atol=1e-10, rtol=1e-10)
    for one, matrix in ((found.QK, model.QK.AB), (found.OV, model.OV.AB)):
        expected = torch.linalg.svdvals(matrix.detach())[..., : one.singular.shape[-1]]
        torch.testing.assert_close(one.singular, expected, atol=1e-10, rtol=1e-10)


def test_the_baseline_is_a_fresh_model_of_that_configuration():
    model = zoo_model("llama", dtype=torch.float64)
    found, fresh = measure_spectrum(model, seed=3), hl.HookedTransformer(model.cfg, seed=3, dtype=torch.float64)
    torch.testing.assert_close(found.OV.initial, measure_spectrum(fresh).OV.singular, atol=1e-12, rtol=1e-12)
    again = measure_spectrum(fresh, seed=3)
    torch.testing.assert_close(again.QK.effective, again.QK.initial_effective, atol=1e-12, rtol=1e-12)


def test_a_planted_low_rank_is_found():
    model = tiny_model(dtype=torch.float64)
    with torch.no_grad():
        model.W_E[:, 3:] = 0
        model.blocks[1].attn.W_Q[0, :, 1:] = 0
    found = measure_spectrum(model)
    assert found.embeddings["W_E"].rank.item() == 3 and found.QK.rank.tolist() == [[4, 4], [1, 4]]
    assert found.order()[0] == ("QK", 1, 0) and found.top(1).rows[0][0] == "L1H0 QK"
    assert found.QK.effective[1, 0].item() == pytest.approx(1)


def test_models_that_read_vectors_have_spectra():
    assert measure_spectrum(vector_model()).embeddings["W_E"].shape == (8, 3)


@pytest.mark.slow
def test_smollm2_and_a_fresh_model_have_full_numerical_rank():
    found = measure_spectrum(hl.load("smollm2-135m-instruct"))
    one = found.embeddings["W_E"]
    assert one.initial_rank.item() == 576 and one.initial_effective > 570
    assert one.effective < one.initial_effective and one.participation < 10 < one.initial_participation
    assert (found.QK.initial_rank == 64).all() and (found.OV.initial_rank == 64).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_weights_do_not_have_rank_0(dtype):
    """The precision that singular values are computed in counts, not that of the weights, which are exact numbers."""
    model = tiny_model(d_vocab=500, d_model=64, n_heads=4, n_layers=1).to(dtype)
    found = measure_spectrum(model)
    assert found.embeddings["W_E"].rank.item() == found.embeddings["W_E"].initial_rank.item() == 64
    assert (found.QK.rank == 16).all() and (found.OV.initial_rank == 16).all()
