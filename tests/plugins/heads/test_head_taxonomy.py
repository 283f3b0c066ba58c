"""Labels: the known ones are found, and chance earns none."""

import pytest
import torch

from hooklens.core.errors import InputError
from hooklens.data.repeated import repeated_tokens
from hooklens.plugins.heads.induction import induction_heads
from hooklens.plugins.heads.scores import key_masks
from hooklens.plugins.heads.taxonomy import LABELS, placebo_mask, taxonomy
from hooklens.testing import induction_model, tiny_model


def test_the_hand_set_heads_get_their_labels_and_the_idle_ones_none():
    found = taxonomy(induction_model())
    assert found.labels() == [["previous token", "unlabelled"], ["unlabelled", "induction"]]
    assert (
        found.note
        == "no name movers: prompt pairs are made of words, and this model has no tokenizer; load it with tokenizer="
    )
    at = list(LABELS).index("induction"), 1, 1
    low, high = (end[at] for end in found.interval())
    assert 1 < low < found.effect[:, *at].mean() < high
    row = dict(zip(found.table().columns, next(r for r in found.table().rows if r[0] == "L0H0"), strict=True))
    assert row["by position"] == 1.0 and found.positions.q[0, 0] < 0.05  # what the previous-token head goes by
    assert found.placebo[:, *at].abs().max() < 1e-5
    assert bool(found.effect[:, 0, 1].isnan().all())  # its score did not pass, so it was not measured


def with_a_negative_head():
    """The induction model, its idle head L1H0 looking as L1H1 does and writing a tenth of the opposite."""
    model = induction_model()
    with torch.no_grad():
        attn = model.blocks[1].attn
        for weight in (attn.W_Q, attn.W_K, attn.W_V):
            weight[0] = weight[1]
        attn.W_O[0] = -0.1 * attn.W_O[1]
        model.W_U.mul_(0.25)  # at ten the loss is too near 0 for a tenth to show
    return model


def test_a_head_that_looks_like_induction_and_lowers_the_logit_is_copy_suppression():
    found = taxonomy(with_a_negative_head())
    assert found.labels()[1] == ["copy suppression", "induction"]
    at = list(LABELS).index("copy suppression"), 1, 0
    assert found.effect[:, *at].mean() < 0 and found.interval()[1][at] < 0
    assert found.suppression.calibration.heads == ["L1H0"] and found.suppression.anti[1, 0] > 0
    assert found.suppression.data == "random tokens that repeat" and len(found.suppression.direct) == len(found.effect)
    row = dict(zip(found.table().columns, next(r for r in found.table().rows if r[0] == "L1H0"), strict=True))
    assert row["anti-copy"] == pytest.approx(float(found.suppression.anti[1, 0]))
    assert row["ECE change"] == pytest.approx(float(found.suppression.calibration.change[0]))
    assert "Calibration without these heads" in str(found.report().to_html())


def test_a_head_that_looks_but_writes_nothing_stays_unlabelled():
    model = induction_model()
    with torch.no_grad():
        model.blocks[1].attn.W_Q[0] = model.blocks[1].attn.W_Q[1]
        model.blocks[1].attn.W_K[0] = model.blocks[1].attn.W_K[1]
    found = taxonomy(model)
    at = list(LABELS).index("induction"), 1, 0
    assert found.score_q[at] < 0.05 and found.labels()[1] == ["unlabelled", "induction"]
    row = next(row for row in found.counts().rows if row[0] == "induction")
    assert row[1:] == (1, 2, 1)


def test_freshly_initialised_models_earn_at_most_the_nominal_share_of_labels():
    families = (
        {},
        {"attn_only": True},
        {"positional_embedding_type": "rotary", "n_key_value_heads": 2, "tie_word_embeddings": True},
    )
    labelled = total = 0
    for seed in range(24):
        model = tiny_model(seed=seed, n_heads=4, d_model=32, d_vocab=64, **families[seed % 3])
        found = taxonomy(model, seed=seed, ioi=0)
        labelled += sum(label != "unlabelled" for row in found.labels() for label in row)
        total += 8
    assert labelled / total <= 0.02  # of 192 heads; nominal: fewer than one model in twenty calls any head


def test_the_placebo_blocks_as_many_other_keys():
    tokens = repeated_tokens(tiny_model(), 5).tokens
    for mask in key_masks(tokens).values():
        other = placebo_mask(mask)
        n = mask.shape[-1]
        free = torch.arange(n) - 1 - (mask[:, :, 1:].sum(-1))  # keys 1..q-1 that are not marked
        assert not bool((other & mask).any()) and not bool(other[:, :, 0].any())
        assert not bool((other & (torch.arange(n) >= torch.arange(n)[:, None])).any())
        diagonal = mask.diagonal(dim1=1, dim2=2).long()
        wanted = torch.minimum(mask.sum(-1), (free + diagonal).clamp_min(0))
        assert torch.equal(other.sum(-1), wanted)


def test_induction_heads_are_scored_and_their_ablation_costs_the_repeat():
    found = induction_heads(induction_model(), n=6)
    assert found.score.mean(0)[1, 1] == 1 and found.order()[0] == (1, 1)
    low, _ = found.interval()
    assert low[1, 1] > 1 and low[0, 0] > 1
    assert found.rise[:, 0, 1].abs().max() < 1e-5
    assert found.rise[:, 1, 1].mean() > found.rise_before[:, 1, 1].mean()
    some = induction_heads(induction_model(), n=6, heads=[(1, 1)])
    torch.testing.assert_close(some.rise[:, 1, 1], found.rise[:, 1, 1])
    assert bool(some.rise[:, 0].isnan().all()) and len(some.table().rows) == 4


def test_bad_input_says_what_would_work():
    asked = {
        r"n is .* at least 6": {"n": 3},
        "level lies": {"level": 0.0},
        "level": {"level": 1.5},
        "ioi is": {"ioi": 3},
    }
    for said, wrong in asked.items():
        with pytest.raises(InputError, match=said):
            taxonomy(tiny_model(), **wrong)
    with pytest.raises(InputError, match="two sequences"):
        induction_heads(tiny_model(), n=1)
    with pytest.raises(InputError, match="post-norm"):
        taxonomy(tiny_model(block="post"))
