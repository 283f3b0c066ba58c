"""Trained models: a small one of our own, in which an induction circuit must have formed, and SmolLM2."""

import math

import pytest
from trained import D_VOCAB, trained_on_repeats

import hooklens as hl
from hooklens.plugins.heads.composition import score_composition
from hooklens.plugins.heads.copying import score_copying
from hooklens.plugins.heads.head_scores import score_heads
from hooklens.plugins.heads.induction import find_induction_heads
from hooklens.plugins.heads.previous_token import score_positions
from hooklens.plugins.heads.taxonomy import classify_heads

pytestmark = pytest.mark.slow


# Seed 2 learns the task another way: no head of it looks at what came next, and none is called an induction head.
@pytest.mark.parametrize("seed", [0, 1])
def test_a_model_trained_on_repeats_forms_an_induction_circuit(seed):
    model, _ = trained_on_repeats(seed)
    found, scores = find_induction_heads(model, n=8), score_heads(model)
    layer, head = found.order()[0]
    assert layer == 1 and found.score.mean(0)[layer, head] > 0.6
    assert found.loss.mean() < 0.1 * math.log(D_VOCAB)
    first = int(scores.mean("previous")[0].argmax())
    low, _ = found.interval()
    assert low[0, first] > 0.5 * math.log(D_VOCAB)  # most of what guessing would cost comes back with it
    labels = classify_heads(model, ioi=0).labels()
    assert labels[0][first] == "previous token" and labels[layer][head] == "induction"
    assert not any(label == "induction" for label in labels[0])


def test_the_circuit_is_in_the_weights():
    model, _ = trained_on_repeats(0)
    scores, found = score_heads(model), score_composition(model)
    previous = int(scores.mean("previous")[0].argmax())
    induction = int(scores.mean("induction")[1].argmax())
    best = found.order()[0]
    assert best[0] == "K" and best[1:4] == (0, previous, 1) and found.q["K"][0, previous, 1, induction] < 0.05
    assert score_copying(model).positive[1, induction] > 0.5
    assert score_positions(model).share[0].argmax() == previous


def test_the_taxonomy_of_smollm2_is_that_which_was_read_head_by_head():
    model = hl.load("smollm2-135m-instruct")
    found = classify_heads(model, seed=3)
    labels = found.labels()
    assert labels[16][0] == "previous token" and labels[18][6] == labels[17][3] == "induction"
    assert labels[24][4] == "copy suppression, negative name mover"
    assert labels[14][3] == labels[8][0] == "duplicate token"
    assert {"name mover", "induction, name mover"} >= {labels[23][0], labels[23][2]}
    assert labels[11][1] == "unlabelled" and found.scores.mean("previous")[11, 1] > 0.7  # it looks, to no effect
    counts = {row[0]: row[1] for row in found.counts().rows}
    assert counts["unlabelled"] > 200 and counts["copy suppression"] <= 4
    negative = found.suppression
    assert negative.anti[24, 4] > 0 and negative.q[24, 4] < 0.05 and negative.calibration.data.startswith("excerpts")
