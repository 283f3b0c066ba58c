"""Composition scores and their chance level."""

import pytest
import torch
from torch import nn

from hooklens.core.errors import InputError
from hooklens.plugins.heads.composition import MODES, _moments, _random, composition
from hooklens.testing import induction_model, tiny_model


def test_the_induction_head_reads_its_keys_from_the_previous_token_head():
    found = composition(induction_model())
    assert found.order()[0] == ("K", 0, 0, 1, 1)
    assert found.scores["Q"][0, 0, 1, 1] == found.scores["V"][0, 0, 1, 1] == 0
    model = induction_model()
    with torch.no_grad():
        model.blocks[1].attn.W_K[1, 11] = 0.0  # the row that keeps position 0 out, which is the largest by far
    found = composition(model, draws=100)
    # |A B| / (|A| |B|) for A and B both the identity between the same 11 dimensions
    assert float(found.scores["K"][0, 0, 1, 1]) == pytest.approx(11**-0.5, abs=1e-6)
    assert found.z["K"][0, 0, 1, 1] > 10 and found.q("K")[0, 0, 1, 1] < 0.05


@pytest.mark.parametrize("changes", [{}, {"n_heads": 4, "n_key_value_heads": 2, "normalization_type": "RMS"}])
def test_the_factored_score_is_that_of_the_formed_matrices(changes):
    model = tiny_model(dtype=torch.float64, n_layers=3, **changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.blocks:
            block.ln1.weight.copy_(1 + 0.3 * torch.randn(8, generator=generator))
    found = composition(model, draws=2)
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
    left, right = torch.rand(2, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64).square()
    mean, deviation = _moments(left, right, 12)
    drawn = torch.stack(_random(left, right, 12, 4000, 0))
    torch.testing.assert_close(drawn.mean(0), torch.full((2, 3), mean, dtype=torch.float64), atol=0, rtol=0.02)
    torch.testing.assert_close(drawn.std(0), deviation, atol=0, rtol=0.05)


def test_random_weights_compose_by_chance():
    p = []
    for seed in range(20):
        found = composition(tiny_model(seed=seed, n_heads=4, d_model=32, attn_only=True), seed=seed)
        p += [found.p[mode][0, :, 1].flatten() for mode in MODES]
    p = torch.cat(p)
    for level in (0.05, 0.1, 0.5):
        assert abs(float((p <= level).float().mean()) - level) < 4 * (level * (1 - level) / len(p)) ** 0.5 + 0.01


def test_what_it_cannot_read_is_refused():
    with pytest.raises(InputError, match="post-norm"):
        composition(tiny_model(block="post"))
    model = tiny_model()
    model.blocks[1].attn.k = nn.Sequential(model.blocks[1].attn.k)
    with pytest.raises(InputError, match=r"blocks.1.attn.k is not a plain linear"):
        composition(model)
    assert len(composition(tiny_model(n_layers=1)).table()) == 0
