"""What people pass to probes: labels and groups in any container, prompt pairs, and numbers that cannot be used."""

import numpy as np
import pytest
import torch
from refused import refused

import hooklens as hl
from hooklens.core.errors import InputError, WrongType
from hooklens.plugins.probing import (
    Logistic,
    MassMean,
    Probe,
    Ridge,
    check_probe_use,
    gather,
    measure_geometry,
    probe_texts,
    project_tokens,
    read_task,
    train_probe,
    transfer_probe,
)
from hooklens.plugins.probing.labels import odd_first
from hooklens.testing import tiny_model

ROWS = [[1, 2], [3, 4], [5, 6], [7, 8]]
POINT = "blocks.0.hook_resid_post"
REFUSED = (InputError, TypeError)  # the type check answers first where it is on, with the argument's name


@pytest.mark.parametrize("form", [torch.tensor, np.array, list, lambda values: [torch.tensor(v) for v in values]])
def test_labels_in_a_tensor_made_every_example_a_class_of_its_own(form):
    task = read_task(tiny_model(), ROWS, form([0, 1, 1, 0]))
    assert task.classes == ["0", "1"] and task.label.tolist() == [0, 1, 1, 0]


def test_groups_in_a_tensor_were_an_ambiguous_truth_value():
    task = read_task(tiny_model(), ROWS, [0, 1, 1, 0], group=torch.tensor([5, 5, 6, 7]))
    assert task.group.tolist() == [0, 0, 1, 2]


def test_a_mask_took_the_entities_of_other_examples():
    task = read_task(tiny_model(), ROWS, [0, 1, 1, 0], group=["a", "b", "c", "d"])
    taken = task.take(torch.tensor([False, True, False, True]))
    assert taken.entities == [["b"], ["d"]] and taken.label.tolist() == [1, 0] and len(taken.tokens) == 2
    with pytest.raises(InputError, match=r"numbered from 0 to 3"):
        task.take([4])


def test_the_two_sides_of_prompt_pairs_are_two_classes():
    pairs = hl.PromptPairs([[1, 2], [3, 4], [5, 6]], [[1, 3], [3, 5], [5, 7]], group=["x", "y", "x"])
    task = read_task(tiny_model(), pairs)
    assert task.classes == ["corrupted", "clean"] and task.label.tolist() == [1, 1, 1, 0, 0, 0]
    assert task.group.tolist() == [0, 1, 0, 0, 1, 0]
    assert [row.tolist() for row in task.tokens] == [*map(list, pairs.clean), *map(list, pairs.corrupted)]
    study = probe_texts(
        tiny_model(), hl.PromptPairs([[i, 1] for i in range(11)], [[i, 2] for i in range(11)]), kind=MassMean()
    )
    assert study.classes == task.classes and study.accuracy == 1.0 and len(study.group.unique()) == 11
    for given in ((pairs, [0, 1, 0]), (hl.PromptPairs([[1, 2]], None),)):
        with pytest.raises(InputError, match=r"need corrupted prompts and no labels"):
            read_task(tiny_model(), *given)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": None}, "labels is a sequence with one entry per prompt"),
        ({"labels": [0, 1, float("nan"), 1]}, "texts, numbers or booleans"),
        ({"labels": [[0], [1], [0], [1]]}, "texts, numbers or booleans|'labels'"),
        ({"pos": 1.5}, "pos is a sequence|'pos'"),
        ({"pos": [0, 0.5, 0, 0]}, "pos is a whole number|'pos'"),
        ({"pos": True}, "pos is a whole number|'pos'"),
    ],
)
def test_a_task_that_cannot_be_read_is_refused_with_a_reason(change, said):
    with pytest.raises(REFUSED, match=said):
        read_task(tiny_model(), ROWS, **({"labels": [0, 1, 0, 1]} | change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"folds": 1}, "folds is a whole number of at least 2"),
        ({"folds": 2.5}, "folds is a whole number|'folds'"),
        ({"null_draws": -1}, "null_draws is a whole number of at least 0"),
        ({"kind": MassMean}, "kind is a kind of probe|'kind'"),
        ({"kind": "ridge"}, "kind is a kind of probe|'kind'"),
        ({"task": ROWS}, "read_task|'task'"),
    ],
)
def test_a_study_that_cannot_be_made_is_refused_with_a_reason(change, said):
    model = tiny_model()
    with pytest.raises(REFUSED, match=said):
        train_probe(model, **({"task": odd_first(model), "kind": MassMean()} | change))


def test_penalties_that_cannot_be_were_errors_of_scikit_learn():
    for kind, value in ((Logistic, 0.0), (Logistic, float("nan")), (Ridge, -1.0), (Ridge, "strong")):
        with pytest.raises(REFUSED, match=r"is a finite number of at least|'alpha'"):
            kind(value)


def test_a_negative_seed_was_an_error_of_scikit_learn():
    model = tiny_model()
    _, study = train_probe(model, odd_first(model), kind=MassMean(), null_draws=1, seed=-1)
    assert len(study.nested) == 40


def test_no_draws_ended_in_an_empty_stack():
    model, task = tiny_model(), odd_first(tiny_model())
    probe = Probe(torch.eye(2, 8), torch.zeros(2), torch.eye(2, 8), point=POINT)
    metric = hl.logit_diff(model, answer=1, wrong_answer=0)
    for method in (
        lambda: measure_geometry(model, [task, task], site=POINT, draws=0),
        lambda: transfer_probe(model, [task, task], site=POINT, draws=0),
        lambda: project_tokens(model, probe, [1, 2, 3], [0, 1, 0], draws=0),
        lambda: check_probe_use(model, probe, task, metric, draws=0),
    ):
        with pytest.raises(InputError, match=r"draws is a whole number of at least 1, got 0"):
            method()


def test_a_probe_of_another_width_or_a_metric_that_is_none_was_a_raw_error():
    model = tiny_model()
    narrow = Probe(torch.eye(2, 4), torch.zeros(2), torch.eye(2, 4), point=POINT)
    with pytest.raises(REFUSED, match=r"reads vectors of size 4 at blocks.0"):
        check_probe_use(model, narrow, odd_first(model), hl.logit_diff(model, answer=1, wrong_answer=0))
    with pytest.raises(REFUSED, match=r"a metric is a function of logits"):
        check_probe_use(model, narrow, odd_first(model), None)
    with pytest.raises(REFUSED, match=r"strength is a finite number|'strength'"):
        check_probe_use(model, narrow, odd_first(model), lambda logits: logits[:, -1, 1], strength="strong")
    with pytest.raises(REFUSED, match=r"probe is a Probe|'probe'"):
        check_probe_use(model, None, odd_first(model), lambda logits: logits[:, -1, 1])
    with pytest.raises(REFUSED, match=r"vectors of size 4"):
        project_tokens(model, Probe(torch.eye(2, 8), torch.zeros(2), torch.eye(2, 8)), [1, 2], [0, 1], second=narrow)
    with pytest.raises(InputError, match=r"no direction"):
        Probe(torch.ones(2, 4), torch.zeros(2), torch.ones(2, 4)).direction  # noqa: B018
    with pytest.raises(InputError, match=r"selects no point"):
        gather(model, ROWS, site=[])
    with pytest.raises(REFUSED, match=r"bias is|'bias'"):
        Probe(torch.eye(2, 4), torch.zeros(3), torch.eye(2, 4))


def test_a_single_task_is_no_list_of_tasks():
    model = tiny_model()
    for compare in (measure_geometry, transfer_probe):
        for tasks in (odd_first(model), []):
            with pytest.raises(REFUSED, match=r"a list of at least one ProbeTask|task is a ProbeTask|'tasks'"):
                compare(model, tasks, site=POINT)


def test_tasks_of_one_name_were_left_out_of_the_top():
    model = tiny_model()
    tasks = [odd_first(model, seed=seed) for seed in (0, 1)]
    transfer = transfer_probe(model, tasks, site=POINT, draws=3)
    expected = sorted([float(transfer.auc[0, 1]), float(transfer.auc[1, 0])], reverse=True)
    assert transfer.names[0] == transfer.names[1] and [row[6] for row in transfer.top().rows] == expected


def test_an_average_is_the_mean_over_positions():
    model = tiny_model(dtype=torch.float64)
    rows = [[1, 2, 3], [4, 5]]
    every = gather(model, rows, site="mlp_out", pos=None)
    acts = gather(model, rows, site="mlp_out", average=True)
    for i in range(2):
        torch.testing.assert_close(acts.x[:, i], every.x[:, every.prompt == i].mean(1), atol=1e-12, rtol=1e-12)


def test_pairs_instead_of_a_task_are_answered_with_the_call_that_makes_a_task():
    with refused(WrongType, r"read_task\(model, pairs\) returns; got PromptPairs$"):
        train_probe(tiny_model(), hl.PromptPairs([[1, 2]], [[1, 3]]))
