"""Scores of heads, and what chance gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.core.errors import HooklensError, InputError
from hooklens.plugins.heads.head_scores import KINDS, key_masks, score_heads
from hooklens.plugins.heads.rotations import above, haar, mass, pooled_p, query_rotations, rotated_masses
from hooklens.results.statistics import q_values
from hooklens.testing import induction_model, tiny_model


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=12))
def test_the_masks_are_what_a_loop_would_mark(tokens):
    found = {kind: mask[0] for kind, mask in key_masks(torch.tensor([tokens])).items()}
    for q in range(len(tokens)):
        for k in range(len(tokens)):
            expected = {
                "previous": k == q - 1 and k > 0,
                "duplicate": 0 < k < q and tokens[k] == tokens[q],
                "induction": 1 < k <= q and tokens[k - 1] == tokens[q] and k - 1 < q,
                "first": k == 0 < q,
            }
            assert {kind: bool(mask[q, k]) for kind, mask in found.items()} == expected


def test_the_hand_set_heads_score_1_and_the_idle_ones_as_even_attention():
    found = score_heads(induction_model())
    assert found.mean("previous")[0, 0] == 1.0 and found.mean("induction")[1, 1] == 1.0
    for kind in KINDS:
        assert found.mean(kind)[0, 1].item() == pytest.approx(found.uniform[kind], abs=1e-5)
    assert found.entropy.mean(0)[0, 1].item() == pytest.approx(found.uniform_entropy, abs=1e-5)
    assert found.entropy.mean(0)[0, 0].item() == 0.0
    assert bool((found.q["previous"][0, 0] < 0.05) & (found.q["induction"][1, 1] < 0.05))
    assert bool((found.p["induction"][0] > 0.05).all())
    assert found.p["previous"][0, 1] == 1.0  # without queries no rotation changes it


def test_a_rotation_keeps_lengths_and_is_new_for_each_head():
    turns = query_rotations(3, 4, 5, torch.Generator().manual_seed(0))
    eye = torch.eye(5, dtype=turns.dtype).expand(3, 4, 5, 5)
    torch.testing.assert_close(turns @ turns.mT, eye, atol=1e-12, rtol=0)
    assert not torch.allclose(turns[0, 0], turns[0, 1])
    entries = haar(2000, 3, torch.Generator().manual_seed(0))
    assert entries.mean(0).abs().max() < 0.06 and (entries.square().mean(0) - 1 / 3).abs().max() < 0.03


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_rotated_score_is_that_of_a_model_with_rotated_weights(positions):
    model = tiny_model(positional_embedding_type=positions, n_heads=4, n_key_value_heads=2, dtype=torch.float64)
    text = torch.tensor([[1, 4, 2, 4, 2, 7], [3, 5, 6, 3, 5, 6]])
    masks = key_masks(text)
    with torch.no_grad():
        _, cache = model.run_with_cache(text, ["q", "k"])
        found = rotated_masses(model, cache, masks, draws=2, seed=3)
        turns = query_rotations(2, 4, 2, torch.Generator().manual_seed(3 * 1_000_003 + 1)).to(torch.float64)
        attn = model.blocks[1].attn
        before = attn.W_Q.clone()
        attn.W_Q.copy_(before @ turns[1])
        _, turned = model.run_with_cache(text, "pattern")
    for kind, mask in masks.items():
        expected = mass(turned["pattern", 1], mask).nanmean(0)
        torch.testing.assert_close(found[kind][1, 1], expected, atol=1e-10, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("n_models", [12, pytest.param(45, marks=pytest.mark.slow)])
def test_p_values_of_freshly_initialised_heads_are_uniform(n_models):
    """Four kinds, 8 heads, models of three families: 32 tests a model of a null that is true."""
    families = (
        {},
        {"attn_only": True},
        {"positional_embedding_type": "rotary", "n_key_value_heads": 2, "tie_word_embeddings": True},
    )
    found, any_called = [], 0
    for seed in range(n_models):
        model = tiny_model(seed=seed, n_heads=4, d_model=32, d_vocab=64, **families[seed % 3])
        scores = score_heads(model, seed=seed)
        each = torch.stack([scores.p[kind] for kind in KINDS])
        any_called += bool((q_values(each) <= 0.05).any())
        found.append(each.flatten())
    p = torch.cat(found)
    for level in (0.05, 0.1, 0.5):
        assert abs(float((p <= level).float().mean()) - level) < 4 * (level * (1 - level) / len(p)) ** 0.5 + 0.01
    assert any_called <= 0.16 * n_models  # at a false discovery rate of 0.05 about 2 models of 45 call any head


def test_pooled_p_orders_heads_and_never_is_0():
    null = torch.rand(50, 2, 3, generator=torch.Generator().manual_seed(0))
    p = pooled_p(torch.tensor([[0.0, 0.5, 9.0], [0.2, 0.9, 0.5]]), null)
    assert p[0, 2] == pytest.approx(1 / 301) and p[0, 0] > p[0, 1] > p[0, 2]
    assert above(torch.tensor([float("nan"), 2.0]), torch.rand(5, 2)).tolist() == [1.0, pytest.approx(1 / 11)]
    with pytest.raises(InputError, match="two draws"):
        pooled_p(torch.zeros(1, 1), torch.zeros(1, 1, 1))


def test_prompts_of_ones_own_and_those_that_cannot_be_scored():
    model = tiny_model()
    found = score_heads(model, [[1, 2, 3, 2], [4, 5, 6, 4]], draws=20)
    assert found.scores["duplicate"].shape == (2, 2, 2)
    alone = score_heads(model, [[1, 2, 3, 4]], draws=20)
    assert bool(alone.mean("duplicate").isnan().all()) and bool((alone.p["duplicate"] == 1).all())
    with pytest.raises(HooklensError, match="one length"):
        score_heads(model, [[1, 2, 3], [1, 2]])


def test_heads_far_from_softmax_and_with_windows_are_scored():
    for changes in ({"score_fn": "linear"}, {"mask": {"part": "sliding_window", "window": 4}}, {"mask": "none"}):
        found = score_heads(tiny_model(**changes), n=4, draws=20)
        assert all(bool(found.mean(kind).isfinite().all()) for kind in KINDS)
        assert bool(found.entropy.isfinite().all())
