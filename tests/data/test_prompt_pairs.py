"""PromptPairs: cut, split, read and written; every method takes them in place of two prompts and a metric."""

import json
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refused import refused

import hooklens as hl
from hooklens.core.errors import HooklensError, InputError, NameNotFound, OutOfRange, WrongType
from hooklens.data.jsonl import read_pairs_file, write_pairs_file
from hooklens.data.prompt_pairs import as_pairs
from hooklens.metrics import AtPosition
from hooklens.plugins.circuits import (
    acdc,
    eap,
    eap_ig_midpoint,
    measure_faithfulness,
    prune_edges,
    run_edges,
    whole_circuit,
)
from hooklens.plugins.patching import attribution_patch, compare_ablations, trace_information
from hooklens.results.result import Result
from hooklens.testing import tiny_model

CLEAN = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [2, 4, 6]])
CORRUPTED = torch.tensor([[1, 5, 3], [4, 2, 6], [7, 1, 9], [2, 9, 6]])
ANSWER, WRONG = [3, 4, 5, 6], [4, 5, 6, 7]
PAIRS = hl.PromptPairs(
    CLEAN, CORRUPTED, answer=ANSWER, wrong_answer=WRONG, group=["x", "y", "x", "z"], columns={"place": [1, 1, 2, 2]}
)
METHODS = {
    "patch": lambda model, *given: hl.patch(model, *given, site="z").per_pair,
    "ablate": lambda model, *given: hl.ablate(model, given[0], *given[2:], value="mean").per_prompt,
    "compare_ablations": lambda model, *given: compare_ablations(model, given[0], *given[2:]).zero.per_prompt,
    "path_patch": lambda model, *given: hl.path_patch(model, *given).per_pair,
    "attribution_patching": lambda model, *given: attribution_patch(model, *given, exact=1).per_pair,
    "information_flow": lambda model, *given: trace_information(model, *given, receivers="final").moved,
    "eap": lambda model, *given: eap(model, *given).scores,
    "eap_ig_midpoint": lambda model, *given: eap_ig_midpoint(model, *given, steps=2).scores,
    "acdc": lambda model, *given: acdc(model, *given, threshold=0.1).circuit.scores,
    "prune_edges": lambda model, *given: prune_edges(model, whole_circuit(model), *given, size=5).metric,
    "run_edges": lambda model, *given: run_edges(model, whole_circuit(model).kept, *given).per_pair,
    "faithfulness": lambda model, *given: measure_faithfulness(model, whole_circuit(model), *given).per_pair,
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_says_the_same_of_pairs_and_of_their_three_parts(method):
    model = tiny_model(dtype=torch.float64)
    metric = hl.logit_diff(model, answer=ANSWER, wrong_answer=WRONG)
    pairs = hl.PromptPairs(CLEAN, CORRUPTED, answer=ANSWER, wrong_answer=WRONG)
    with hl.engine(verify=0, progress=False):
        torch.testing.assert_close(
            method(model, pairs), method(model, CLEAN, CORRUPTED, metric), atol=1e-12, rtol=0, equal_nan=True
        )


def test_groups_of_pairs_are_those_of_the_interval():
    model = tiny_model()
    with hl.engine(verify=0):
        assert hl.path_patch(model, PAIRS).group.tolist() == [0, 1, 0, 2]
        assert hl.path_patch(model, PAIRS).grouped(torch.tensor([0, 0, 1, 1])).group.tolist() == [0, 0, 1, 1]


def test_pairs_are_cut_with_answers_metric_groups_and_columns():
    model = tiny_model()
    one = PAIRS[-1]
    assert (len(one), one.clean.tolist(), one.answer, one["place"]) == (1, [[2, 4, 6]], [6], [2])
    for index in ([2, 0], torch.tensor([2, 0]), torch.tensor([2, 0]).numpy()):
        part = PAIRS[index]
        assert (part.clean.tolist(), part.wrong_answer) == ([[7, 8, 9], [1, 2, 3]], [6, 4])
        assert (part.group.tolist(), part["place"]) == ([0, 0], [2, 1])
    assert PAIRS[torch.tensor([True, False, False, True])].answer == PAIRS[::3].answer == [3, 6]
    assert [pair.answer for pair in PAIRS] == [[3], [4], [5], [6]]
    held = as_pairs(model, PAIRS)
    assert held[1:3].metric.answer.tolist() == [4, 5] and held.metric.answer.tolist() == ANSWER


def test_a_group_is_never_split():
    for seed in range(5):
        one, other = PAIRS.split(seed=seed)
        assert len(one) + len(other) == 4 and not set(one.group.tolist()) & set(other.group.tolist())


def test_pairs_print_as_a_short_table_and_load_back(tmp_path):
    lines = str(PAIRS).splitlines()
    assert lines[1].split() == ["clean", "corrupted", "answer", "wrong", "answer", "group"] and len(lines) == 6
    assert "<table>" in PAIRS._repr_html_()
    PAIRS.save(tmp_path / "pairs.safetensors")
    back = Result.load(tmp_path / "pairs.safetensors")
    assert back.table().rows == PAIRS.table().rows and back["place"] == PAIRS["place"]


def test_pairs_with_a_metric_of_the_library_could_not_be_saved(tmp_path):
    model, path = tiny_model(), tmp_path / "pairs.safetensors"
    metrics = {
        "logit_diff": hl.logit_diff(model, answer=ANSWER, wrong_answer=WRONG),
        "prob": hl.prob(model, answer=3),
        "kl": hl.kl(model, CLEAN),
        "loss": hl.loss(model, CLEAN),
    }
    logits = model(CLEAN)
    for metric in metrics.values():
        hl.PromptPairs(CLEAN, CORRUPTED, metric).save(path)
        back = Result.load(path).metric
        assert type(back) is type(metric) and torch.equal(back(logits), metric(logits))
    json.dumps(hl.PromptPairs(CLEAN, CORRUPTED, metrics["logit_diff"]).to_json())


def test_a_metric_that_cannot_be_saved_is_refused_before_the_write(tmp_path):
    @dataclass(frozen=True, eq=False)
    class Own(AtPosition):
        def on_read(self, logits):
            return logits[:, 0, 0]

    path = tmp_path / "pairs.safetensors"
    with pytest.raises(WrongType, match=r"PromptPairs.metric is a function, which a result file cannot store.*metrics"):
        hl.PromptPairs(CLEAN, CORRUPTED, lambda logits: logits.sum()).save(path)
    with pytest.raises(InputError, match=r"Own cannot be saved: its module '.*' is not part of a registered plugin"):
        hl.PromptPairs(CLEAN, CORRUPTED, Own(pos=-1)).save(path)
    texts = hl.PromptPairs("a b", "a c", lambda logits: logits.sum(), answer=" d", wrong_answer=" e")
    with pytest.raises(InputError, match=r"these pairs have a metric, which would be lost; save them with PromptPairs"):
        write_pairs_file(texts, tmp_path / "pairs.jsonl")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]), min_size=1)] * 4, st.integers(0, 3)), min_size=1
    )
)
def test_a_file_of_pairs_reads_back_as_written(tmp_path_factory, rows):
    clean, corrupted, answer, wrong, group = (list(column) for column in zip(*rows, strict=True))
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_pairs_file(hl.PromptPairs(clean, corrupted, answer=answer, wrong_answer=wrong, group=group), path)
    back = read_pairs_file(path)
    assert (back.clean, back.corrupted, back.answer, back.wrong_answer) == (clean, corrupted, answer, wrong)
    assert [a == b for a in back.group for b in back.group] == [a == b for a in group for b in group]


def test_token_ids_are_no_lines_of_a_file(tmp_path):
    with pytest.raises(InputError, match=r"holds texts, and these pairs have as clean: tensor"):
        write_pairs_file(PAIRS, tmp_path / "pairs.jsonl")


@pytest.mark.parametrize(
    ("ask", "error", "said"),
    [
        (lambda m: hl.PromptPairs(["a", "b"], ["c"]), InputError, "got 2 clean and 1 corrupted"),
        (lambda m: hl.PromptPairs("a", "c", answer=" d"), InputError, "answer and wrong_answer are given together"),
        (lambda m: hl.PromptPairs("a", "c", answer=[1, 2], wrong_answer=3), InputError, "got 2 for 1 pairs"),
        (lambda m: hl.PromptPairs("a", "c", group=[1, 2]), InputError, "group needs one value per pair, got 2 for 1"),
        (
            lambda m: hl.PromptPairs("a", "c", columns=[1]),
            WrongType,
            r"columns is a dict of names and lists.*got \[1\]",
        ),
        (lambda m: hl.PromptPairs("a", "c", columns={"x": 1}), WrongType, "x is a list or a tensor .* got 1"),
        (lambda m: hl.PromptPairs("a", "c", group=3), WrongType, "group is a list or a tensor .* got 3"),
        (lambda m: hl.PromptPairs(3, "c"), WrongType, "texts or rows of token ids, got 3"),
        (lambda m: PAIRS[4], IndexError, "numbers below 4 or 4 booleans; got 4"),
        (lambda m: PAIRS["end"], NameNotFound, "no column named 'end'; there are: place"),
        (lambda m: PAIRS[torch.tensor([True])], InputError, "numbers below 4 or 4 booleans"),
        (lambda m: hl.patch(m, PAIRS, CORRUPTED), InputError, "clean is PromptPairs, which contain corrupted"),
        (lambda m: hl.patch(m, CLEAN, CORRUPTED), InputError, "metric is missing, and the pairs hold no answers"),
        (lambda m: hl.patch(m, CLEAN, metric=lambda x: x), InputError, "corrupted prompts are missing"),
    ],
)
def test_what_cannot_be_used_is_said(ask, error, said):
    with refused(error, said):
        ask(tiny_model())


@pytest.mark.parametrize("index", [None, True])
def test_what_means_a_new_axis_to_torch_gave_all_pairs(index):
    with pytest.raises(OutOfRange, match="pairs are indexed by a slice"):
        PAIRS[index]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"answer": 1.5, "wrong_answer": 2}, "answer is a text or a token id"),
        ({"answer": 1, "wrong_answer": [2, None]}, "wrong_answer is a text or a token id"),
        ({"group": torch.tensor([0.5, 1.0])}, "group holds one label per pair"),
        ({"group": torch.zeros(2, 2, dtype=torch.long)}, "group holds one label per pair"),
        ({"group": [[1], [2]]}, "group holds one label per pair"),
        ({"group": [None, 1]}, "group holds one label per pair"),
        ({"group": [float("nan"), 1]}, "group holds one label per pair"),
        ({"metric": 5}, "metric is a function of logits"),
        ({"clean": [None, "a"]}, "prompts are texts or rows of token ids, got None"),
    ],
)
def test_pairs_of_wrong_values_are_refused_when_they_are_made(given, says):
    with refused(HooklensError, says):
        hl.PromptPairs(**{"clean": ["a", "b"], "corrupted": ["c", "d"]} | given)


def test_no_pairs_have_no_halves_and_tensor_rows_have_a_table():
    with pytest.raises(InputError, match="no pairs to split"):
        PAIRS[:0].split()
    rows = list(CLEAN)
    pairs = hl.PromptPairs(rows, [row.numpy() for row in rows], answer=torch.tensor(3), wrong_answer=4)
    assert pairs.table().rows[0][:2] == ("[1, 2, 3]", "[1, 2, 3]")
