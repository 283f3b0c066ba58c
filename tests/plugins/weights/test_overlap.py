"""Overlap of writers and readers: dense norms, the null's known mean, planted compositions, angles by SciPy."""

import pytest
import torch
from model.zoo import ZOO, zoo_model

from hooklens.core.errors import InputError
from hooklens.plugins.weights.angles import measure_angles
from hooklens.plugins.weights.components import random_block
from hooklens.plugins.weights.matrices import folded_heads, folded_neurons
from hooklens.plugins.weights.overlap import measure_overlap
from hooklens.testing import induction_model, tiny_model


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "neox", "no_norm"])
def test_compositions_are_norms_of_dense_products(name):
    model = zoo_model(name, dtype=torch.float64)
    found = measure_overlap(model, draws=2)
    centred = name in ("gpt2", "neox")
    at = {key: i for i, key in enumerate(found.writers)}, {key: i for i, key in enumerate(found.readers)}
    kv = "G" if model.cfg.n_key_value_heads < model.cfg.n_heads else "H"

    def score(W, R):
        W = W - W.mean(-1, keepdim=True) if centred else W
        return float((W @ R).norm() / (W.norm() * R.norm()))

    group = model.cfg.n_heads // model.cfg.n_key_value_heads
    early, late, mlp = folded_heads(model, 0), folded_heads(model, 1), folded_neurons(model, 1)
    for head in range(model.cfg.n_heads):
        W = early.OV[head].AB
        row = at[0][f"L0H{head}"]
        for other in range(model.cfg.n_heads):
            assert float(found.composition[row, at[1][f"L1H{other}.q"]]) == pytest.approx(score(W, late.Q[other]))
            for which, R in (("k", late.K), ("v", late.V)):
                column = at[1][f"L1{kv}{other // group}.{which}"]
                assert float(found.composition[row, column]) == pytest.approx(score(W, R[other]))
        both = mlp.reads if mlp.gate is None else torch.cat([mlp.reads, mlp.gate], 1)
        assert float(found.composition[row, at[1]["MLP1"]]) == pytest.approx(score(W, both))
    wrote = folded_neurons(model, 0).writes
    assert float(found.composition[at[0]["MLP0"], at[1]["MLP1"]]) == pytest.approx(score(wrote, both))


def test_only_what_comes_later_reads():
    for parallel in (False, True):
        model = tiny_model(block="parallel" if parallel else "pre")
        found = measure_overlap(model, draws=2)
        seen = {
            (w, r)
            for i, w in enumerate(found.writers)
            for j, r in enumerate(found.readers)
            if not found.composition[i, j].isnan()
        }
        assert (("L0H0", "MLP0") in seen) != parallel and ("MLP0", "L1H0.q") in seen
        assert not any(w.startswith("L1") and r.startswith("L0") for w, r in seen)
        assert ("MLP0", "MLP0") not in seen and ("L0H0", "L0H1.q") not in seen
        assert len(found.order()) == len(seen) and found.q[~found.composition.isnan()].isfinite().all()


@pytest.mark.parametrize(("norm", "width"), [("RMS", 24), ("LN", 23)])
def test_the_mean_square_of_the_null_is_one_over_the_width(norm, width):
    """E |W R|^2 = |W|^2 |R|^2 / d for random bases of any spectrum; behind a LayerNorm d is one less."""
    model = tiny_model(d_model=24, n_heads=3, normalization_type=norm, dtype=torch.float64)
    found = measure_overlap(model, draws=1200)
    square = found.null_mean.square() + found.null_sd.square() * 1199 / 1200
    kept = square[~square.isnan()]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / width), atol=0.02 / width, rtol=0)


def test_a_fresh_model_looks_like_its_null_and_a_planted_pair_does_not():
    model = tiny_model(d_model=24, n_heads=3, n_layers=3, normalization_type="RMS", dtype=torch.float64)
    fresh = measure_overlap(model, draws=400)
    p = fresh.p[~fresh.p.isnan()]
    assert 0.4 < p.mean() < 0.6 and (p <= 0.05).double().mean() < 0.12
    with torch.no_grad():
        model.blocks[2].attn.W_K[1] = model.blocks[0].attn.W_O[2].T
    found = measure_overlap(model, draws=400)
    i, j = found.order()[0]
    assert (found.writers[i], found.readers[j]) == ("L0H2", "L2H1.k")
    assert found.p[i, j].item() == pytest.approx(1 / 401) and found.shared[i, j].item() == pytest.approx(1)


def test_a_common_rotation_changes_no_composition_and_no_null():
    """Only how bases lie to each other counts: rotate the whole stream."""
    a, b = (zoo_model("no_norm", dtype=torch.float64, act_fn="relu") for _ in "ab")
    R = random_block(8, 8, 8, torch.Generator().manual_seed(0), a.W_E.detach())
    with torch.no_grad():
        for block in b.blocks:
            for layer in (block.attn.q, block.attn.k, block.attn.v, block.mlp.in_):
                layer.weight.copy_(layer.weight @ R)
            for layer in (block.attn.o, block.mlp.out):
                layer.weight.copy_(R.T @ layer.weight)
    one, two = measure_overlap(a, draws=20), measure_overlap(b, draws=20)
    for name in ("composition", "shared", "null_mean", "p"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), atol=1e-9, rtol=1e-9, equal_nan=True)


def test_the_induction_heads_keys_read_the_previous_token_head():
    found = measure_overlap(induction_model(dtype=torch.float64), draws=200)
    i, j = found.order()[0]
    assert (found.writers[i], found.readers[j]) == ("L0H0", "L1H1.k")
    assert found.composition[1].isnan().all()  # L0H1 writes nothing
    # Each of 11 keys reads its own previous token minus twice position 0: of the span of these vectors ten dimensions
    # are differences of tokens, and one leans to position 0. It is the strongest, so that the composition, weighed by
    # strength, is no wonder for such spectra, and the angles are.
    assert found.p[i, j] > 0.05
    angles = measure_angles(induction_model(dtype=torch.float64), "L0H0", "L1H1.k", draws=99)
    expected = torch.tensor([1.0] * 10 + [45**-0.5], dtype=torch.float64)
    torch.testing.assert_close(angles.cosine, expected, atol=1e-7, rtol=1e-7)
    assert (angles.p[:10] == 0.01).all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_angles_are_those_of_scipy(name):
    from scipy.linalg import subspace_angles

    model = zoo_model(name, dtype=torch.float64)
    found = measure_angles(model, "L0H1", "L1H0.q", draws=30)
    W, R = folded_heads(model, 0).O[1], folded_heads(model, 1).Q[0]
    W = W - W.mean(-1, keepdim=True) if name == "gpt2" else W
    expected = torch.as_tensor(subspace_angles(W.T.numpy(), R.numpy())).sort().values
    torch.testing.assert_close(found.cosine.arccos(), expected, atol=1e-6, rtol=1e-6)
    assert found.null.shape == (30, 4) and (found.p > 0).all()


def test_angles_of_one_subspace_with_itself_are_0():
    model = tiny_model(d_model=24, n_heads=3, normalization_type="RMS", dtype=torch.float64)
    with torch.no_grad():
        model.blocks[1].attn.W_K[1] = model.blocks[0].attn.W_O[2].T
    found = measure_angles(model, "L0H2", "L1H1.k", draws=99)
    torch.testing.assert_close(found.cosine, torch.ones_like(found.cosine))
    assert (found.p <= 0.01).all()


def test_every_family_is_read_or_refused_with_a_reason():
    for name in ZOO:
        if name.startswith("post"):
            with pytest.raises(InputError, match="post-norm"):
                measure_overlap(zoo_model(name), draws=2)
        else:
            assert measure_overlap(zoo_model(name), draws=2).composition.shape[0] > 0
    with pytest.raises(InputError, match="at least 2"):
        measure_overlap(tiny_model(), draws=1)
    with pytest.raises(InputError, match="there are heads 0 to 1"):
        measure_angles(tiny_model(), "L0H9", "L1H0.q")
    with pytest.raises(InputError, match=r"L1H0\.q"):
        measure_angles(tiny_model(), "L0H0", "L1H0q")
    with pytest.raises(InputError, match="is 0 everywhere"):
        measure_angles(induction_model(), "L0H1", "L1H1.k")


def test_angles_are_a_family_and_their_q_counts_it():
    from hooklens.results.statistics import q_values

    found = measure_angles(tiny_model(), "L0H1", "L1H0.q", draws=30)
    assert torch.equal(found.q, q_values(found.p)) and found.table().columns[-1] == "q"
    assert found.top(2).rows == found.table(2).rows
