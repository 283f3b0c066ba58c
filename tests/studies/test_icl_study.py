"""The study of in-context learning: planted learners are found, and the trainings resume."""

import re

import pytest
import torch
from refused import refused

import hooklens as hl
from hooklens.core.errors import HooklensError, InputError, NameNotFound
from hooklens.model.config import Softmax, VectorEmbed
from hooklens.plugins.algorithmic.icl import GradientDescent, LearnerComparison, Zero, construct_descent
from hooklens.studies.icl_errors import LEAST_SQUARES, OWN_STEP, SHARED_STEP, measure_errors, single_steps
from hooklens.studies.icl_runs import (
    PLANNED,
    chosen_runs,
    folder_name,
    raw_attention,
    seconds_of,
    study_runs,
    train_planned,
)
from hooklens.studies.icl_study import study_in_context
from hooklens.testing import tiny_model

DATA = hl.data.in_context_regression(3, (3, 5), inputs="normal")
READER = construct_descent(GradientDescent((1.0,)), 3, 5)


@pytest.fixture(scope="module")
def study():
    """Two transformers made by hand: the best single step of the mixture, and one with twice its rate."""
    summed, _ = single_steps(DATA, list(DATA.points))
    twice = GradientDescent((2 * summed.rate,), mean=False)
    models = {
        "best": construct_descent(summed.learner(), 3, 5),
        "twice": construct_descent(twice, 3, 5),
    }
    fixed_data = hl.data.in_context_regression(3, 4)
    fixed = construct_descent(single_steps(fixed_data, [4])[0].learner(), 3, 4), fixed_data
    return study_in_context(models, DATA, fixed=fixed, searched=False, tasks=256)


def test_the_best_step_made_by_hand_is_recognised(study):
    compared = study.comparisons["best"]
    at = compared.learners.index(SHARED_STEP)
    assert float(compared.share[at]) < 1e-9 and float(compared.cosine[at]) > 1 - 1e-6
    assert study.attention["best"].r2 > 1 - 1e-6
    assert "cosine of its gradients with those of the summed step is 1.0000" in " ".join(study.findings)


def test_errors_are_those_in_closed_form_within_their_standard_error(study):
    """The step's exact error is its measured one, and so is that of a rate twice as large: 0 - 2 eta a + eta^2 b."""
    errors, summed = study.errors, study.errors.summed
    excess, spread = errors.mean_excess("best", summed)
    assert 0 < spread < 0.2 and abs(excess) < 4 * spread
    linear, square = (summed.zero - summed.own_errors) / summed.own_rates, None
    square = linear / summed.own_rates
    exact = summed.zero - 4 * summed.rate * linear + 4 * summed.rate**2 * square
    off = (errors.error_of("twice") - exact).abs() / errors.standard_errors[1]
    assert float(off.max()) < 4
    assert errors.mean_excess("twice", summed)[0] > 0.5


def test_learners_answer_the_same_prompts(study):
    errors = study.errors
    assert bool((errors.error_of(LEAST_SQUARES) < 1e-6).tolist()[0])  # 3 examples in 3 dimensions determine w
    torch.testing.assert_close(errors.error_of("best"), errors.error_of(SHARED_STEP), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(errors.error_of("preconditioned step"), errors.error_of(SHARED_STEP))
    assert float(errors.excess[0].min()) > -0.2 and errors.zero == pytest.approx(3)
    with pytest.raises(InputError, match="no model or learner 'worst'; there are best, twice, best step"):
        errors.error_of("worst")


def test_a_model_at_one_number_of_examples_is_compared_with_the_best_step_there(study):
    assert float(study.fixed.excess.abs().max()) < 1e-4  # prompt by prompt, so that no sampling error is left
    assert "alone, a model of one layer of linear attention (fixed in the tables)" in study.findings[0]
    assert "within 2 %" in study.findings[0] and study.findings[0].endswith("query is 1.0000.")


def test_findings_table_and_page_state_the_numbers(study):
    table = study.table()
    assert [row[0] for row in table.rows] == ["best", "twice"] and table.rows[0][4] == pytest.approx(1, abs=0.5)
    page = study.report().to_html()
    assert all(finding.split("(")[0] in page for finding in study.findings)
    assert "1 layer" in study.findings[3] and "least squares" in study.findings[-1]
    assert study.gap is None and "by depth" not in page
    rows = {row[0]: row for row in study.costs.table().rows}
    assert list(rows) == ["fixed", "best", "twice"] and rows["best"][2] == table.rows[0][2]
    assert rows["best"][-1].startswith("answers closest to those of ") and set(LearnerComparison.terms) >= {"its error"}
    assert "y has no effect" in page and not study.figure().layout.title.text
    assert "best step" in rows["fixed"][-1] and rows["fixed"][2] == pytest.approx(float(study.fixed.errors.mean()))
    assert study.figure().data and study.errors.figure().data


def test_a_study_is_kept_in_a_file(study, tmp_path):
    study.save(tmp_path / "study.safetensors")
    again = hl.Result.load(tmp_path / "study.safetensors")
    assert again.findings == study.findings and again.table().rows == study.table().rows


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: study_in_context({}, DATA), "at least one model"),
        (lambda: study_in_context({"least squares": READER}, DATA), "no part of the study has; got 'least squares'"),
        (lambda: study_in_context({"fixed": READER}, DATA), "no part of the study has; got 'fixed'"),
        (lambda: study_in_context({"a": READER, "a, head 1": READER}, DATA), "got 'a, head 1'"),
        (lambda: study_in_context({"a": READER}, DATA, fixed=(READER, DATA)), "its data have 3 to 5"),
        (lambda: measure_errors({SHARED_STEP: READER}, DATA), "no learner and no part"),
        (lambda: measure_errors({"a": READER}, DATA, learners={OWN_STEP: Zero()}), "is measured anyway"),
        (lambda: train_planned("nowhere", device="gpu"), "'gpu' is not a device"),
        (lambda: train_planned("nowhere", names=[]), "at least one value"),
        (
            lambda: study_in_context({"a": construct_descent(GradientDescent((1.0,)), 3, 5)}, DATA, at=9),
            "3 to 5; got 9",
        ),
        (lambda: measure_errors({"a": construct_descent(GradientDescent((1.0,)), 2, 5)}, DATA, learners={}), "d_in=4"),
    ],
)
def test_models_and_numbers_that_do_not_fit_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: study_in_context([READER], DATA), "by name, such as"),
        (lambda: study_in_context({1: READER}, DATA), "no part of the study has; got 1"),
        (lambda: study_in_context({"a": READER}, DATA, searched="no"), "searched is True or False"),
        (lambda: study_in_context({"a": "b"}, DATA), "the study of 'a' needs a HookedTransformer"),
        (lambda: study_in_context({"a": READER}, DATA, fixed=READER), r"its data, \(model, data\)"),
        (lambda: study_in_context({"a": READER}, DATA, seed="x"), "seed is a whole number"),
        (lambda: measure_errors({"a": READER}, DATA, learners=[Zero()]), "learners are given by name"),
        (lambda: measure_errors({"a": READER}, None), "in_context_regression"),
        (lambda: study_runs([READER]), "runs by name"),
    ],
)
def test_other_objects_in_the_place_of_models_and_runs(call, message):
    with refused(HooklensError, message):
        call()


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"n_layers": 1, "score_fn": "linear", "attn_only": True}, "the interpolation of weights: .* has 2 heads"),
        ({"n_layers": 1, "score_fn": Softmax(soft_cap=5.0)}, "the kernel smoother: .* a soft cap"),
        ({"n_layers": 2, "block": "post"}, "rank collapse: .* post-norm"),
    ],
)
def test_what_a_model_does_not_have_was_an_error_after_all_other_work(changes, left_out):
    model = tiny_model(embed=VectorEmbed(d_in=4), d_vocab_out=1, **changes)
    study = study_in_context({"m\x1b[31m": model}, DATA, searched=False, tasks=4)
    assert re.match(rf"m\\x1b\[31m is studied without {left_out}", study.findings[-1]) and len(study.left_out) == 1
    assert not any("\x1b" in finding for finding in study.findings)
    assert "is studied without" in study.report().to_html()


def test_interleaved_prompts_fit_a_context_of_the_length_that_the_task_needs():
    data = hl.data.in_context_regression(2, (1, 2), interleaved=True)
    model = tiny_model(embed=VectorEmbed(d_in=3), d_vocab_out=1, n_ctx=data.n_positions + 2)
    study = study_in_context({"m": model}, data, searched=False, tasks=4)
    assert [shift for shift in study.shifts["m"].shifts if "examples" in shift] == ["3 examples"]


def test_raw_attention_of_other_dimensions_reads_their_points():
    model = raw_attention("linear", 1, d=5)
    assert model.cfg.embed.d_in == model.cfg.d_model == 6
    batch = hl.data.in_context_regression(5, 4).batch(0, 3)
    assert model(batch.inputs).shape == (3, 5, 1)
    with refused(HooklensError, "d is a whole number of at least 1"):
        raw_attention("linear", 1, d=0)


def test_raw_attention_trains_attention_alone_in_the_basis_of_the_tokens():
    model = raw_attention("linear", 1, seed=3)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {f"blocks.0.attn.{part}.weight" for part in "qkvo"}
    tokens = torch.randn(2, 4, 11)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        model.blocks[0].attn.o.weight.zero_()
        assert torch.equal(cache["resid_pre", 0], tokens) and torch.equal(model(tokens)[..., 0], -tokens[..., -1])


def test_planned_trainings_go_on_where_they_stopped(tmp_path):
    names = ["linear, 10 examples"]
    runs = train_planned(tmp_path, names=names, budget=1e-6, show=False)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*.rows")}
    assert list(runs) == names and len(written) == 2
    again = train_planned(tmp_path, names=names, budget=1e-6, show=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.rows")} == written
    assert seconds_of(again[names[0]]) == seconds_of(runs[names[0]]) > 0
    assert [path.name for path in tmp_path.iterdir()] == [folder_name(names[0], 0, 2)]
    assert [planned.name for planned in chosen_runs("linear")] == ["linear"]
    with pytest.raises(NameNotFound, match="closest: linear"):
        train_planned(tmp_path, names=["liner"])


def test_plans_cover_the_curriculum_and_differ_in_score_and_depth():
    by_name = {planned.name: planned for planned in PLANNED}
    data = by_name["deep"].data(100, seed=0)
    assert data.points == range(5, 51) and data.inputs == "normal" and 0 < data.curriculum < 100
    assert by_name["linear, 10 examples"].data(100, seed=0).points == range(10, 11)
    scores = {name: planned.model(0).cfg.score_fn.name for name, planned in by_name.items()}
    assert scores["linear"] == "linear" and scores["softmax"] == scores["deep"] == "softmax"
    assert by_name["deep"].model(0).cfg.n_layers == 6


@pytest.mark.slow
def test_runs_are_studied_from_their_folders(tmp_path):
    runs = train_planned(tmp_path, names=["linear, 10 examples", "softmax"], budget=1e-6, show=False)
    study = study_runs(runs, tasks=32)
    assert "GD++, 6 steps" in study.errors.learners and "Learners by depth, with searched rates" in study.findings[-1]
    assert (
        study.errors.models == ["softmax"] and int(study.fixed.lengths[0]) == 10 and OWN_STEP in study.errors.learners
    )
    for checkpoint in runs["softmax"].checkpoints():
        checkpoint.path.unlink()
    with refused(HooklensError, "has no checkpoint: they were removed"):
        study_runs(runs)
