"""The grokking step of planted curves, the phases, and the drop of the norm against controls."""

import math

import numpy as np
import pytest
import torch
from refused import refused
from torch import Tensor

import hooklens as hl
from hooklens.core.errors import HooklensError
from hooklens.model.config import VectorEmbed
from hooklens.plugins.algorithmic.grokking import (
    GrokkingStep,
    compare_norm_drops,
    find_grokking,
    find_phases,
    squared_weights,
)
from hooklens.plugins.algorithmic.grokking.grokking_step import demo
from hooklens.plugins.algorithmic.grokking.norm_drop import GROKKING, NO_DECAY, SHUFFLED
from hooklens.testing import tiny_model
from hooklens.training import Settings

STEPS = torch.arange(0, 1001, 10)
NEVER = 10**9


def curve(step):
    """0.1 before a step, 1 from it on."""
    return torch.where(step > STEPS, 0.1, 1.0)


@pytest.mark.parametrize(
    ("memorised", "generalised", "verdict"),
    [
        (100, 800, "grokked"),
        (100, 200, "grokked"),  # twice as late is enough
        (100, 190, "did not grok: generalised without a delay"),
        (100, NEVER, "did not grok: memorised, not generalised by the end"),
        (NEVER, NEVER, "did not grok: never memorised"),
        (NEVER, 500, "did not grok: generalised without a memorised training set"),
    ],
)
def test_the_verdict_of_planted_curves(memorised, generalised, verdict):
    step = GrokkingStep.of_curves(STEPS, curve(memorised), STEPS, curve(generalised))
    assert step.verdict == verdict and step.grokked == (verdict == "grokked")
    assert step.memorised_at == (None if memorised == NEVER else memorised)
    assert step.generalised_at == (None if generalised == NEVER else generalised)
    known = NEVER not in (memorised, generalised)
    assert step.gap == (generalised - memorised if known else None)
    assert verdict in step.statement and dict(step.table().rows)["verdict"] == verdict
    assert step.rise_at == (None if generalised == NEVER else generalised - 10)


def test_memorisation_is_known_to_the_step_and_generalisation_to_the_evaluation():
    every = torch.arange(1000)
    train = (every >= 123).float()
    step = GrokkingStep.of_curves(every, train, torch.tensor([0, 500, 1000]), torch.tensor([0.0, 0.5, 1.0]))
    assert (step.memorised_at, step.generalised_at) == (123, 1000)
    assert step.train_accuracy.tolist() == [0.0, 1.0, 1.0]  # that after the last step is of the last one


def test_the_bound_decides():
    held_out = torch.linspace(0, 1, len(STEPS))
    early, late = (GrokkingStep.of_curves(STEPS, curve(10), STEPS, held_out, bound=bound) for bound in (0.5, 1.0))
    assert (early.generalised_at, late.generalised_at) == (500, 1000)


def test_a_recorded_accuracy_equal_to_the_bound_reaches_it():
    accuracy = torch.tensor([0.1, 0.9, 0.9]).double()  # float32, as in the record of a run
    found = GrokkingStep.of_curves(STEPS[:3], accuracy, STEPS[:3], accuracy, bound=0.9)
    assert (found.memorised_at, found.generalised_at) == (10, 10)


def test_a_run_is_read_from_its_record():
    data = hl.data.modular_arithmetic(p=5, fraction=0.6)
    settings = Settings(batch=25, evaluate=4, optimizer=hl.training.AdamW(lr=0.03))
    run = hl.train(tiny_model(d_vocab=6), data, steps=40, settings=settings, show=False)
    step = find_grokking(run, bound=0.5)
    accuracy = run.steps()["accuracy"]
    assert accuracy[0] < 0.5 <= accuracy.max()
    assert step.steps.tolist() == [0, 10, 20, 30, 40] and step.memorised_at == int(np.argmax(accuracy >= 0.5))
    np.testing.assert_array_equal(step.held_out_accuracy.numpy(), run.evaluations()["accuracy"])
    steps, squares = squared_weights(run)
    final = sum(float(p.detach().double().square().sum()) for p in run.checkpoints()[-1].load().parameters())
    assert torch.equal(squared_weights(run.path)[1], squares)  # of a folder it knew no name to open it with
    assert steps[-1] == 39 and abs(float(squares[-1]) - final) < 0.1 * final  # a step later
    start = sum(float(p.detach().double().square().sum()) for p in run.checkpoints()[0].load().parameters())
    assert math.isclose(float(squares[0]), start, rel_tol=1e-5)


def test_the_ends_of_a_window_are_steps_of_the_record_and_not_interpolated(monkeypatch):
    monkeypatch.setattr("hooklens.plugins.algorithmic.grokking.norm_drop._POINTS", 3)
    data = hl.data.modular_arithmetic(p=5, fraction=0.6)
    settings = Settings(optimizer=hl.training.AdamW(lr=0.03, weight_decay=1.0))
    run = hl.train(tiny_model(d_vocab=6), data, steps=20, settings=settings, show=False)
    sums = np.square(run.steps()["parameter_norms"].astype(np.float64)).sum(1)
    steps, squares = squared_weights(run, including=(9, 15))
    assert {9, 15} <= set(steps.tolist()) and len(squared_weights(run)[0]) == 3
    drops = compare_norm_drops([(GROKKING, 0, steps, squares)], start=9, stop=15)
    assert float(drops.drop[0]) == pytest.approx(1 - sums[15] / sums[9], rel=1e-6)
    coarse = compare_norm_drops([(GROKKING, 0, *squared_weights(run))], start=9, stop=15)
    assert abs(float(coarse.drop[0]) - float(drops.drop[0])) > 1e-4


def test_a_run_without_held_out_pairs_cannot_grok():
    run = hl.train(tiny_model(d_vocab=6), hl.data.modular_arithmetic(p=5, fraction=1.0), steps=1, show=False)
    with refused(HooklensError, "no grokking without held-out pairs"):
        find_grokking(run)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"bound": 0.0}, "bound"), ({"bound": 1.5}, "bound is an accuracy above 0"), ({"delay": 0.5}, "delay")],
)
def test_thresholds_that_make_no_sense_are_refused(options, says):
    with refused(HooklensError, says):
        GrokkingStep.of_curves(STEPS, curve(1), STEPS, curve(2), **options)
    with refused(HooklensError, "one of them has no step"):
        GrokkingStep.of_curves(STEPS[:0], curve(1)[:0], STEPS, curve(2))


def test_the_gap_is_drawn():
    figure = demo(tiny_model()).figure()
    assert {trace.name for trace in figure.data} == {"training", "held out"} and len(figure.layout.shapes) >= 2


def test_phases_end_where_the_losses_turn():
    steps = torch.tensor([0, 50, 100, 400, 700, 900, 1000])
    excluded = torch.tensor([4.7, 1.0, 0.2, 1.0, 3.0, 4.7, 0.0])  # the last one is after generalisation
    held_out = torch.tensor([4.7, 12.0, 19.0, 20.0, 18.5, 3.0, 0.1])
    phases = find_phases(steps, excluded, held_out, generalised_at=900)
    assert (phases.memorised, phases.formed, phases.cleaned) == (100, 700, 900)
    assert [row[2] for row in phases.table().rows] == [100, 700, 900]
    with refused(HooklensError, "at least 4 checkpoints up to generalisation at step 100, and there are 3"):
        find_phases(steps, excluded, held_out, generalised_at=100)


def drops(grokking, no_decay, shuffled):
    """Runs whose sum of squares falls from 100 by these shares between steps 100 and 200."""
    steps = torch.tensor([0, 100, 200, 300])
    kinds = {GROKKING: grokking, NO_DECAY: no_decay, SHUFFLED: shuffled}
    curves = [
        (kind, 0, steps, torch.tensor([150.0, 100.0, 100 * (1 - drop), 50.0]))
        for kind, drop in kinds.items()
        if drop is not None
    ]
    return compare_norm_drops(curves, start=100, stop=200)


@pytest.mark.parametrize(
    ("shares", "is_evidence", "says"),
    [
        ((0.4, -0.1, 0.2), True, "the drop goes with grokking"),
        ((0.4, -0.1, 0.5), False, "the drop is no evidence, because runs that do not grok lose as much"),
        ((-0.1, -0.2, -0.3), False, "the drop is no evidence"),  # no drop at all
        ((0.4, None, 0.1), False, "no control with weight decay 0 was trained"),
        ((0.4, None, None), False, "no control with weight decay 0 or shuffled answers was trained"),
    ],
)
def test_a_drop_is_evidence_only_above_both_controls(shares, is_evidence, says):
    result = drops(*shares)
    assert result.is_evidence == is_evidence and says in result.statement
    known = [share for share in shares if share is not None]
    torch.testing.assert_close(result.drop, torch.tensor(known))
    assert len(result.figure().data) == len(known)


def test_norms_that_cannot_be_compared_are_refused():
    steps, squares = torch.tensor([0, 100]), torch.ones(2)
    with refused(HooklensError, "none of these runs grokked"):
        compare_norm_drops([(NO_DECAY, 0, steps, squares)], start=0, stop=50)
    with refused(HooklensError, "these runs were stopped before"):
        compare_norm_drops([(GROKKING, 0, steps, squares)], start=0, stop=500)


def test_curves_of_zeros_and_ones_lists_and_arrays_are_read():
    """In whole numbers the bound of 0.99 became 0."""
    steps, train, held_out = torch.tensor([0, 10, 20]), torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    expected = GrokkingStep.of_curves(steps, train.float(), steps, held_out.float())
    for change in (lambda x: x, Tensor.tolist, Tensor.numpy, lambda x: x.half().requires_grad_() if x is train else x):
        found = GrokkingStep.of_curves(*map(change, (steps, train, steps, held_out)))
        assert (found.memorised_at, found.generalised_at) == (10, 20) and found.statement == expected.statement
    own = held_out.float()
    found = GrokkingStep.of_curves(steps, train, steps, own)
    own.zero_()
    assert found.generalised_at == 20


@pytest.mark.parametrize(
    ("steps", "accuracy", "says"),
    [
        ([0, 10], [0.0, math.nan], "accuracy holds finite numbers of at least 0 and at most 1, got .*nan"),
        ([0, 10], [50.0, 100.0], "accuracy holds finite numbers of at least 0 and at most 1, got .*100"),
        ([0.0, 0.5], [0, 10], "steps holds whole numbers from 0 on in ascending order"),
        ([10, 0], [0.0, 1.0], "steps holds whole numbers from 0 on in ascending order"),
        ([0, 10], [0.0], "has a number for each of its 2 steps, got 1"),
        ([0, 10], None, "is a tensor, an array or a list of numbers, got None"),
        ([0, 10], [[0.0, 1.0]], r"along one axis, got torch.float32 \[1, 2\]"),
    ],
)
def test_curves_that_are_none_gave_a_verdict(steps, accuracy, says):
    good = [0, 10], [0.0, 1.0]
    for curves in ((steps, accuracy, *good), (*good, steps, accuracy)):
        with refused(HooklensError, says):
            GrokkingStep.of_curves(*curves)


def test_a_run_that_was_stopped_between_two_evaluations_has_a_rise():
    steps = torch.tensor([0, 10, 20])
    found = GrokkingStep.of_curves(steps, torch.tensor([0.0, 0.0, 1.0]), steps[:2], torch.tensor([0.0, 1.0]))
    assert (found.memorised_at, found.generalised_at, found.rise_at) == (20, 10, 0)


def test_a_task_without_accuracies_was_said_not_to_memorise():
    data = hl.data.in_context_regression(2, (2, 3))
    vectors = {"embed": VectorEmbed(data.d_in), "d_vocab": 1, "d_vocab_out": 1}
    settings = Settings(loss="squared_error", evaluate=1)
    run = hl.train(tiny_model(**vectors), data, steps=1, settings=settings, show=False)
    with refused(HooklensError, "its answers are numbers and not tokens"):
        find_grokking(run)


@pytest.mark.parametrize("name", ["steps.rows", "evaluations.rows"])
def test_a_record_that_was_cut_changed_the_verdict(name, tmp_path):
    data, settings = hl.data.modular_arithmetic(p=5, fraction=0.6), Settings(batch=25, evaluate=4)
    run = hl.train(tiny_model(d_vocab=6), data, steps=8, settings=settings, show=False, out=tmp_path / "run")
    path = run.path / name
    path.write_bytes(path.read_bytes()[:-1])
    with refused(HooklensError, f"{name} lacks intact rows of steps that the run has taken"):
        find_grokking(run)


def test_phases_of_lists_and_of_losses_that_are_none():
    losses = [4.7, 1.0, 0.2, 1.0]
    assert find_phases([0, 1, 2, 3], losses, losses, generalised_at=3).memorised == 2
    with refused(HooklensError, "held_out_loss holds finite numbers"):
        find_phases([0, 1, 2, 3], losses, [math.nan] * 4, generalised_at=3)
    with refused(HooklensError, "excluded has a number for each of its 4 steps, got 3"):
        find_phases([0, 1, 2, 3], losses[:3], losses, generalised_at=3)


def test_sums_that_rise_or_are_none_and_windows_that_end_before_they_begin():
    said = drops(-1.0, -0.2, -0.3).statement
    assert said.endswith("rose by 100.0%, and in no control it fell: the drop is no evidence, because there is none.")
    curve_of = {"start": 0, "stop": 10}
    with refused(HooklensError, "squares holds finite numbers of at least 0, got .*nan"):
        compare_norm_drops([(GROKKING, 0, [0, 10], [1.0, math.nan])], **curve_of)
    with refused(HooklensError, "squares is a tensor, an array or a list"):
        compare_norm_drops([(GROKKING, 0, [0, 10], None)], **curve_of)
    with refused(HooklensError, r"a curve is \(kind, seed, steps, squares\)"):
        compare_norm_drops([(GROKKING, 0)], **curve_of)
    with refused(HooklensError, "the window from start 10 to stop 0 ends before it begins"):
        compare_norm_drops([(GROKKING, 0, [0, 10], [2.0, 1.0])], start=10, stop=0)
