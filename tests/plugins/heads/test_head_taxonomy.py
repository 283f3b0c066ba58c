"""Labels: the known ones are found, and chance earns none."""

import functools
from dataclasses import replace

import pytest
import torch

from hooklens.core.errors import InputError
from hooklens.data.repeated import repeated_tokens
from hooklens.plugins.heads.head_scores import key_masks
from hooklens.plugins.heads.induction import find_induction_heads
from hooklens.plugins.heads.knockout import KEPT, knockout_after
from hooklens.plugins.heads.taxonomy import LABELS, classify_heads, placebo_keep
from hooklens.plugins.heads.which import captured
from hooklens.studies import taxonomy_claims, taxonomy_report
from hooklens.testing import induction_model, tiny_model


@functools.cache
def hand_set():
    """The taxonomy of the hand-set model, which several tests look at."""
    return classify_heads(induction_model())


@functools.cache
def negative():
    """That of the model with a head of copy suppression."""
    return classify_heads(with_a_negative_head())


def test_the_hand_set_heads_get_their_labels_and_the_idle_ones_none():
    found = hand_set()
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
    found = negative()
    assert found.labels()[1] == ["copy suppression", "induction"]
    at = list(LABELS).index("copy suppression"), 1, 0
    assert found.effect[:, *at].mean() < 0 and found.interval()[1][at] < 0
    assert found.suppression.calibration.heads == ["L1H0"] and found.suppression.anti[1, 0] > 0
    assert found.suppression.data == "random tokens that repeat" and len(found.suppression.direct) == len(found.effect)
    row = dict(zip(found.table().columns, next(r for r in found.table().rows if r[0] == "L1H0"), strict=True))
    assert row["anti-copy"] == pytest.approx(float(found.suppression.anti[1, 0]))
    assert row["ECE change"] == pytest.approx(float(found.suppression.calibration.change[0]))
    assert "Calibration without these heads" in str(taxonomy_report(found).to_html())


def test_a_head_that_looks_but_writes_nothing_stays_unlabelled():
    model = induction_model()
    with torch.no_grad():
        model.blocks[1].attn.W_Q[0] = model.blocks[1].attn.W_Q[1]
        model.blocks[1].attn.W_K[0] = model.blocks[1].attn.W_K[1]
    found = classify_heads(model)
    at = list(LABELS).index("induction"), 1, 0
    assert found.score_q[at] < 0.05 and found.labels()[1] == ["unlabelled", "induction"]
    row = next(row for row in found.counts().rows if row[0] == "induction")
    assert row[1:] == (1, 2, 1, 0, 0, 1)  # one with the score and no effect, none opposite or negligible, one unmatched


@pytest.mark.slow
@pytest.mark.parametrize("n_models", [9, pytest.param(24, marks=pytest.mark.slow)])
def test_freshly_initialised_models_earn_at_most_the_nominal_share_of_labels(n_models):
    families = (
        {},
        {"attn_only": True},
        {"positional_embedding_type": "rotary", "n_key_value_heads": 2, "tie_word_embeddings": True},
    )
    labelled = total = 0
    for seed in range(n_models):
        model = tiny_model(seed=seed, n_heads=4, d_model=32, d_vocab=64, **families[seed % 3])
        found = classify_heads(model, seed=seed, ioi=0)
        labelled += sum(label != "unlabelled" for row in found.labels() for label in row)
        total += 8
    assert labelled / total <= 0.02  # nominal: fewer than one model in twenty calls any head


def test_the_placebo_takes_as_much_attention_from_other_keys():
    """It blocked as many other keys, which held 0.02 where the label's held 0.58."""
    tokens = repeated_tokens(tiny_model(), 4, length=9).tokens
    pattern = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).pow(3).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    for mask in key_masks(tokens).values():
        keep, marked = placebo_keep(pattern, mask), mask[:, None]
        assert bool((keep.where(marked, 1.0) == 1).all())
        own, others = ((pattern * part).sum(-1) for part in (marked, ~marked))
        kept = pattern * keep
        left = (kept / kept.sum(-1, keepdim=True) * ~marked).sum(-1)
        torch.testing.assert_close(others - left, torch.minimum(own, others))  # in the end, rows normalised
        plain = placebo_keep(pattern, mask, normalised=False)
        torch.testing.assert_close((pattern * (1 - plain)).sum(-1), torch.minimum(own, others))


@pytest.mark.parametrize("score", ["softmax", "linear"])
def test_weakened_keys_are_those_of_a_hooked_pattern(score):
    model = tiny_model(dtype=torch.float64, score_fn=score)
    tokens = repeated_tokens(model, 4, length=9)
    mask = key_masks(tokens.tokens)["induction"]
    untouched = captured(model, tokens.tokens, KEPT)[1]
    _, cache = model.run_with_cache(tokens.tokens, "pattern")
    keeps = [placebo_keep(cache["pattern", layer].detach(), mask, normalised=score == "softmax") for layer in range(2)]
    found = knockout_after(model, untouched, tokens.tokens, tokens.metric(), "placebo", keeps, [(0, 1), (1, 0)])

    def weaken(pattern, hook, layer, head):
        new = pattern[:, head] * keeps[layer][:, head]
        if score == "softmax":
            new = new / new.sum(-1, keepdim=True)
        pattern[:, head] = new
        return pattern

    for i, (layer, head) in enumerate([(0, 1), (1, 0)]):
        hook = (("pattern", layer), functools.partial(weaken, layer=layer, head=head))
        edited = tokens.metric()(model.run_with_hooks(tokens.tokens, fwd_hooks=[hook]))
        torch.testing.assert_close(found.fall[:, i], (found.base_per_sequence - edited).detach(), atol=1e-10, rtol=1e-8)


def test_what_was_blocked_is_reported_beside_the_effect_for_label_and_placebo():
    model = with_a_negative_head()
    with torch.no_grad():
        model.blocks[1].attn.W_Q[1].mul_(0.002)  # so that others are attended to as well
    found = classify_heads(model)
    at = list(LABELS).index("induction"), 1, 1
    own, placebo = found.blocked[:, *at].tolist()
    assert 0.3 < own < 0.5 and placebo == pytest.approx(own, abs=0.01)
    assert bool(found.blocked[:, 0, 0, 1].isnan().all())
    control = next(
        one for one in taxonomy_claims(found).claims if one.statement.startswith("L1H1 is an induction")
    ).control
    assert control.what == "rise of the loss, as much attention taken from others"


def softened(scale):
    """The induction model, L1H1's queries so short that its target gets a part of its attention only."""
    model = induction_model()
    with torch.no_grad():
        model.blocks[1].attn.W_Q[1].mul_(scale)
    return model


def test_a_placebo_that_took_nothing_made_a_label_causal():
    """A head that gives its target all of its attention leaves the placebo none, and only `blocked` said so."""
    found, at = hand_set(), (list(LABELS).index("induction"), 1, 1)
    assert found.blocked[:, *at].tolist() == pytest.approx([1.0, 0.0], abs=1e-5)
    assert bool(found.passes[at]) and bool(found.unmatched[at])
    row = dict(zip(found.table().columns, next(r for r in found.table().rows if r[0] == "L1H1"), strict=True))
    assert row["label"] == "induction (no matched control)" and row["placebo took"] == pytest.approx(0.0, abs=1e-5)
    assert found.labels()[1][1] == "induction"  # the attention and its effect are as they were
    said = {one.statement: one for one in taxonomy_claims(found).claims}["L1H1 is an induction head"]
    assert not said.causal and said.control is None and "no control" in said.sentence()
    assert "no matched control: its other keys have only 0%" in said.sentence()
    page = str(taxonomy_report(found).to_html())
    assert "induction (no matched control)" in page and "placebo took" in page
    assert dict(zip(found.counts().columns, found.counts().rows[2], strict=True))["no matched control"] == 1


@pytest.mark.parametrize("scale", [0.002, 0.003, 0.004])
def test_the_placebo_is_matched_while_the_target_has_up_to_two_thirds(scale):
    """Of t on the target the others hold 1 - t: they can give all of t up to a half, (1 - t) / t of it beyond."""
    model, at = softened(scale), (list(LABELS).index("induction"), 1, 1)
    found = classify_heads(model, n=6, ioi=0)
    own, placebo = found.blocked[:, *at].tolist()
    assert found.matched[at].item() == pytest.approx(placebo / own) and placebo <= min(own, 1 - own) + 1e-5
    assert bool(found.unmatched[at]) == (scale == 0.004)
    said = {one.statement: one for one in taxonomy_claims(found).claims}["L1H1 is an induction head"]
    assert said.causal == (said.control is not None) == (scale != 0.004)


def test_a_placebo_gave_back_what_it_took_when_rows_were_normalised():
    """Weights cut by t moved t^2 / (1 - t) of attention: a control of 0.01 where t is 0.1."""
    pattern = torch.tensor([[[[0.1, 0.6, 0.3]]]], dtype=torch.float64)
    keep = placebo_keep(pattern, torch.tensor([[[True, False, False]]]))
    new = pattern * keep / (pattern * keep).sum(-1, keepdim=True)
    assert new.flatten().tolist() == pytest.approx([0.2, 8 / 9 * 0.6, 8 / 9 * 0.3])


def test_an_effect_that_goes_the_other_way_is_said_to():
    """L24H4 of a real model: attention of an induction head, effect -0.245 [-0.315, -0.179], "no effect shown"."""
    found = negative()
    at = list(LABELS).index("induction"), 1, 0
    low, high = (float(end[at]) for end in found.interval())
    assert low < high < 0 and bool(found.opposite[at]) and not bool(found.candidates[at])
    said = {one.statement: one for one in taxonomy_claims(found).claims}["L1H0 is an induction head"]
    assert said.verdict == "opposite effect" and said.opposite and not said.causal
    assert "opposite effect" in said.sentence()
    counts = {row[0]: row for row in found.counts().rows}
    assert dict(zip(found.counts().columns, counts["induction"], strict=True))["opposite effect"] == 1
    blind = replace(found, score_p=found.score_p.index_fill(0, torch.tensor([3]), 1.0))  # no suppression by its OV
    row = next(row for row in blind.table().rows if row[0] == "L1H0")
    assert row[1] == "unlabelled (induction: opposite effect; no matched control)"


def test_a_labelled_head_of_almost_no_effect_is_called_negligible():
    found = negative()
    at = list(LABELS).index("induction"), 1, 1
    assert bool(found.passes[at]) and not bool(found.negligible[at])
    assert float(found.share[at]) == pytest.approx(float(found.effect[:, *at].mean() / found.loss.mean()))
    small = replace(
        found, effect=found.effect * 1e-4, placebo=found.placebo * 1e-4
    )  # as sure, ten thousand times smaller
    assert bool(small.passes[at]) and bool(small.negligible[at])
    row = dict(zip(small.table().columns, next(r for r in small.table().rows if r[0] == "L1H1"), strict=True))
    assert row["label"] == "induction (detectable, negligible; no matched control)" and abs(row["share of loss"]) < 0.01
    assert small.labels() == found.labels()  # the role is the same


def test_the_score_at_a_fixed_offset_is_that_of_the_literature():
    """The mean of the diagonal period - 1 below the main one, on random tokens twice over: period + 1 places."""
    model = induction_model()
    found = find_induction_heads(model, n=4, length=9)
    tokens = repeated_tokens(model, 4, length=9, period=4, seed=1).tokens[:, 1:]
    assert torch.equal(tokens[:, :4], tokens[:, 4:])
    _, cache = model.run_with_cache(tokens, "pattern")
    for layer in range(2):
        by_hand = torch.stack([cache["pattern", layer][:, :, q, q - 3] for q in range(3, 8)]).mean(0)
        torch.testing.assert_close(found.offset_score[:, layer], by_hand)
    assert (
        4 / 5 <= float(found.offset_score.mean(0)[1, 1]) <= 1.0
    )  # at the first of five places nothing has come before
    assert "at fixed offset" in found.table().columns and found.score.mean(0)[1, 1] == 1.0


def test_induction_heads_are_scored_and_their_ablation_costs_the_repeat():
    found = find_induction_heads(induction_model(), n=6)
    assert found.score.mean(0)[1, 1] == 1 and found.order()[0] == (1, 1)
    low, _ = found.interval()
    assert low[1, 1] > 1 and low[0, 0] > 1
    assert found.rise[:, 0, 1].abs().max() < 1e-5
    assert found.rise[:, 1, 1].mean() > found.rise_before[:, 1, 1].mean()
    some = find_induction_heads(induction_model(), n=6, heads=[(1, 1)])
    torch.testing.assert_close(some.rise[:, 1, 1], found.rise[:, 1, 1])
    assert bool(some.rise[:, 0].isnan().all()) and len(some.table().rows) == 4


def test_bad_input_says_what_would_work():
    asked = {
        r"n is .* at least 6": {"n": 3},
        "alpha lies": {"alpha": 0.0},
        "alpha": {"alpha": 1.5},
        "ioi is": {"ioi": 3},
    }
    for said, wrong in asked.items():
        with pytest.raises(InputError, match=said):
            classify_heads(tiny_model(), **wrong)
    with pytest.raises(InputError, match="two sequences"):
        find_induction_heads(tiny_model(), n=1)
    with pytest.raises(InputError, match="post-norm"):
        classify_heads(tiny_model(block="post"))
