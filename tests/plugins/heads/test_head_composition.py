"""Composition scores and their chance level."""

import pytest
import torch
from torch import nn

from hooklens.core.errors import InputError
from hooklens.plugins.heads.composition import MODES, _moments, _random, _t_tail, score_composition, standing_out
from hooklens.testing import induction_model, tiny_model


def test_the_induction_head_reads_its_keys_from_the_previous_token_head():
    found = score_composition(induction_model())
    assert found.order()[0] == ("K", 0, 0, 1, 1)
    assert found.scores["Q"][0, 0, 1, 1] == found.scores["V"][0, 0, 1, 1] == 0
    model = induction_model()
    with torch.no_grad():
        model.blocks[1].attn.W_K[1, 11] = 0.0  # the row that keeps position 0 out, which is the largest by far
    found = score_composition(model, draws=50)
    # |A B| / (|A| |B|) for A and B both the identity between the same 11 dimensions
    assert float(found.scores["K"][0, 0, 1, 1]) == pytest.approx(11**-0.5, abs=1e-6)
    assert found.z["K"][0, 0, 1, 1] > 10 and found.q["K"][0, 0, 1, 1] < 0.05


@pytest.mark.parametrize("changes", [{}, {"n_heads": 4, "n_key_value_heads": 2, "normalization_type": "RMS"}])
def test_the_factored_score_is_that_of_the_formed_matrices(changes):
    model = tiny_model(dtype=torch.float64, n_layers=3, **changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.blocks:
            block.ln1.weight.copy_(1 + 0.3 * torch.randn(8, generator=generator))
    found = score_composition(model, draws=2)
    centre = torch.eye(8, dtype=torch.float64)
    if not changes:
        centre = centre - 1 / 8
    with torch.no_grad():
        gains = [centre @ torch.diag(block.ln1.weight) for block in model.blocks]
        OV = [g @ block.attn.OV.AB for g, block in zip(gains, model.blocks, strict=True)]
        QK = [g @ block.attn.QK.AB @ g.T for g, block in zip(gains, model.blocks, strict=True)]
    for a in range(3):
        for c in range(3):
            for b in range(model.cfg.n_heads):
                for d in range(model.cfg.n_heads):
                    readers = {"Q": QK[c][d], "K": QK[c][d].T, "V": OV[c][d]}
                    for mode, reader in readers.items():
                        norm = (OV[a][b] @ reader).norm() / OV[a][b].norm() / reader.norm()
                        expected = float(norm) if a < c else 0.0
                        assert float(found.scores[mode][a, b, c, d]) == pytest.approx(expected, abs=1e-9)


def test_the_moments_of_random_orientation_are_those_of_many_draws():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(n, 4, dtype=torch.float64, generator=generator) for n in (2, 3))
    right = right.square()
    left, right = (spectra / spectra.sum(1, keepdim=True) for spectra in (left, right))
    mean, deviation = _moments(left, right, 12)
    drawn = _random(left, right, 12, 2500, generator)
    torch.testing.assert_close(drawn.mean(0), torch.full((2, 3), mean, dtype=torch.float64), atol=0, rtol=0.02)
    torch.testing.assert_close(drawn.std(0), deviation, atol=0, rtol=0.05)


def test_random_weights_compose_by_chance():
    p = []
    for seed in range(12):
        found = score_composition(tiny_model(seed=seed, n_heads=4, d_model=32, attn_only=True), draws=30, seed=seed)
        p += [found.p[mode][0, :, 1].flatten() for mode in MODES]
    p = torch.cat(p)
    for level in (0.05, 0.1, 0.5):
        assert abs(float((p <= level).float().mean()) - level) < 4 * (level * (1 - level) / len(p)) ** 0.5 + 0.01


def models_called(n_models, **shape):
    """Of models with random weights: the share in which any pair and mode is called, and all of their p."""
    found = [
        score_composition(tiny_model(seed=seed, attn_only=True, **shape), draws=20, seed=seed)
        for seed in range(n_models)
    ]
    called = sum(bool(torch.stack([one.q[mode] for mode in MODES]).nan_to_num(1.0).min() <= 0.05) for one in found)
    p = torch.cat([one.p[mode].flatten() for one in found for mode in MODES])
    return called / n_models, p[~p.isnan()]


@pytest.mark.slow
def test_random_models_of_few_heads_seldom_have_a_pair_that_stands_out():
    """With a normal tail a quarter of models of 3 x 6 random heads had a q of 0.05 or less."""
    called, p = models_called(40, n_layers=3, n_heads=6, d_head=8, d_model=48)
    assert called <= 0.1 and float((p <= 1e-3).float().mean()) < 1.5e-3


def test_random_models_of_fewer_heads_seldom_have_one_above_random_orientations():
    """With one random frame for all pairs of a draw, three in ten of such models had a q of 0.05 or less."""
    called, p = models_called(16, n_layers=3, n_heads=4, d_head=8, d_model=32)
    assert called <= 0.15 and float((p <= 0.05).float().mean()) < 0.065


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_layers", "n_heads", "d_head"),
    [(2, 5, 8), (3, 6, 8), (3, 5, 16), (4, 8, 8), (6, 6, 8), (12, 5, 8), (2, 2, 8), (3, 4, 8)],
)
def test_q_values_of_random_models_keep_their_rate_down_to_the_smallest_size(n_layers, n_heads, d_head):
    called, p = models_called(150, n_layers=n_layers, n_heads=n_heads, d_head=d_head, d_model=n_heads * d_head)
    assert called <= 0.1, called  # 0.05 and three standard errors of 150 models
    assert float((p <= 0.05).float().mean()) < 0.06


@pytest.mark.parametrize(("df", "t", "p"), [(5, 4.032, 0.005), (9, 3.250, 0.005), (20, 3.552, 0.001), (5, 0.0, 0.5)])
def test_the_tail_of_student_s_t_is_that_of_the_tables(df, t, p):
    assert float(_t_tail(torch.tensor(t), torch.tensor(float(df)))) == pytest.approx(p, rel=0.04)


def test_wrapped_layers_are_multiplied_out_and_post_norm_blocks_are_refused():
    """Adapters had to be merged into the weights first."""
    plain, wrapped = tiny_model(), tiny_model()
    wrapped.blocks[1].attn.k = nn.Sequential(wrapped.blocks[1].attn.k)
    expected, found = (score_composition(model, draws=2).scores["K"] for model in (plain, wrapped))
    torch.testing.assert_close(found, expected)
    with pytest.raises(InputError, match="post-norm"):
        score_composition(tiny_model(block="post"))
    assert len(score_composition(tiny_model(n_layers=1)).table()) == 0


def sharing(strength, seed):
    """Four layers of eight heads that all read and write one more direction of the stream, no pair more than others."""
    sizes = {"n_layers": 4, "n_heads": 8, "d_model": 64, "d_head": 8, "d_vocab": 64}
    model = tiny_model(seed=seed, attn_only=True, normalization_type=None, **sizes)
    generator = torch.Generator().manual_seed(seed)
    shared = nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.attn.q, block.attn.k, block.attn.v, block.attn.o):
                w = linear.weight
                by = torch.randn(64, generator=generator) / 8 * strength * w.norm() / 8
                w += by[:, None] * shared if linear is not block.attn.o else shared[:, None] * by
    return model, shared


@pytest.mark.parametrize("strength", [0.0, 1.0, 3.0])
def test_heads_that_share_a_direction_of_the_stream_are_not_called_composed(strength):
    """Against random orientation two thirds of all pairs of such a model had p <= 0.05."""
    found = [score_composition(sharing(strength, seed)[0], draws=2) for seed in range(6)]
    assert {one.null for one in found} == {"specific"}
    p = torch.cat([torch.stack([one.p[mode] for mode in MODES]).flatten() for one in found])
    p = p[~p.isnan()]
    assert len(p) == 6 * 3 * 6 * 64
    for level in (0.01, 0.05, 0.5):
        assert abs(float((p <= level).float().mean()) - level) < 0.015
    called = sum(bool((one.q[mode] <= 0.05).any()) for one in found for mode in MODES)
    assert called <= 4  # of 18; a pair is called in one of twenty

    if strength == 3.0:
        above = torch.cat([(one.z[mode] > 1.645).float()[~one.z[mode].isnan()] for one in found for mode in MODES])
        assert above.mean() > 0.4  # what the column of orientations still says


def test_a_pair_that_is_linked_stands_first_among_heads_that_share_a_direction():
    model, shared = sharing(3.0, 0)
    with torch.no_grad():
        written = model.blocks[1].attn.W_O[3]  # d_head d_model
        own = written - (written @ shared)[:, None] * shared
        model.blocks[2].attn.W_K[5] += 2 * own.T
    found = score_composition(model, draws=2)
    assert found.order()[0] == ("K", 1, 3, 2, 5) and found.q["K"][1, 3, 2, 5] < 0.01
    assert found.table(1).rows[0][:3] == ("L1H3", "L2H5", "K") and found.table().columns[-1] == "q (specific)"


def test_with_few_heads_random_orientation_is_the_null_and_the_table_says_so():
    found = score_composition(tiny_model(), draws=5)
    assert found.null == "orientation" and found.table().columns[-1] == "q (orientation)"
    assert all(bool(found.specific[mode].isnan().all()) for mode in MODES)
    assert found.table(1).rows[0][4] is None


def test_pairs_without_any_score_do_not_stand_out():
    scores, pair = torch.rand(2, 6, 2, 6) + 0.1, torch.zeros(2, 6, 2, 6, dtype=torch.bool)
    pair[0, :, 1] = True
    scores[0, 2, 1] = 0.0  # a writer that writes nothing
    _, p = standing_out(scores, pair)
    assert bool((p[0, 2, 1] == 1).all()) and bool(p[0, 0, 1].isfinite().all()) and bool(p[1].isnan().all())
    nothing = standing_out(torch.zeros_like(scores), pair)
    assert bool((nothing[1][0, :, 1] == 1).all())
