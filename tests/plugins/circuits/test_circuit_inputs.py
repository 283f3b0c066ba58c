"""What circuits accept as a model, a circuit, a mask, a size or a threshold, and the error for anything else."""

import contextlib
import math

import pytest
import torch
from jaxtyping import TypeCheckError
from refused import refused

import hooklens as hl
from hooklens.core.errors import WrongType
from hooklens.plugins.circuits import (
    acdc,
    acdc_nodes,
    circuit_graph,
    circuit_of,
    eap,
    evaluate_circuit,
    measure_faithfulness,
    prune_edges,
    prune_edges_below,
    prune_nodes,
    prune_nodes_below,
    run_edges,
    trace_faithfulness,
    transfer_circuit,
    whole_circuit,
)
from hooklens.testing import or_gate, tiny_model

CLEAN, CORRUPTED = torch.tensor([[1, 5, 2]]), torch.tensor([[1, 6, 2]])
MODEL = tiny_model()
GRAPH = circuit_graph(MODEL)
CHAIN = ["embed->L0H1.v", "L0H1->logits"]
NOT_NUMBERS = [True, "x", None, math.nan]


def diff(logits):
    return logits[:, -1, 3] - logits[:, -1, 4]


PROMPTS = (CLEAN, CORRUPTED, diff)
PAIRS = hl.PromptPairs(*PROMPTS)


@pytest.mark.parametrize(
    "written",
    [
        lambda kept: kept,
        lambda kept: kept.tolist(),
        lambda kept: kept.nonzero().flatten(),
        lambda kept: kept.nonzero().flatten().tolist(),
        lambda kept: [GRAPH.name(edge) for edge in kept.nonzero().flatten().tolist()],
    ],
    ids=["mask", "list of booleans", "numbers", "list of numbers", "names"],
)
@pytest.mark.parametrize("chosen", [CHAIN, [], "L0H0->logits"], ids=["two", "none", "one by its name"])
def test_a_mask_is_read_as_a_mask_and_not_as_edge_numbers(written, chosen):
    kept = circuit_of(MODEL, chosen).kept
    assert torch.equal(circuit_of(MODEL, written(kept)).kept, kept)
    assert not (whole_circuit(MODEL).without(written(kept)).kept & kept).any()


@pytest.mark.parametrize("written", [lambda kept: kept.numpy(), list], ids=["array", "list of tensors"])
def test_a_mask_that_is_no_tensor_is_read_too(written):
    kept = circuit_of(MODEL, CHAIN).kept
    with contextlib.suppress(TypeCheckError):
        assert torch.equal(circuit_of(MODEL, written(kept)).kept, kept)


@pytest.mark.parametrize(
    ("edges", "says"),
    [
        ([True, False], "each of this graph's 46 edges, got 2 values"),
        (torch.ones(45, dtype=torch.bool), "each of this graph's 46 edges, got 45 values"),
        ([0, True], r"a list of names such as 'embed->L0H0.q', .* got True"),
        ([1.5], "got 1.5"),
        (torch.full((46,), 0.5), "got 0.5"),
        ([None], "got None"),
        (None, "got None"),
        (3, "numbers from 0 to 45"),
        (torch.ones(1, 46, dtype=torch.bool), "such as circuit.kept; got"),
    ],
)
def test_what_names_no_edges_is_refused_with_what_does(edges, says):
    with refused(hl.HooklensError, says):
        circuit_of(MODEL, edges)


def test_named_edges_are_kept_also_where_no_path_leads_through_them():
    dangling = circuit_of(MODEL, ["L0H0->logits"])
    assert dangling.edges == ["L0H0->logits"] and dangling.dropped == 0
    assert not GRAPH.on_a_path(dangling.kept[None]).any()
    scores = eap(MODEL, *PROMPTS)
    for circuit in (scores.top_edges(9), scores.above(0.05), acdc(MODEL, *PROMPTS, threshold=0.05).circuit):
        assert torch.equal(GRAPH.on_a_path(circuit.kept[None])[0], circuit.kept)


def test_a_number_between_0_and_1_mixes_the_live_and_the_ablated_value():
    gate, logit = or_gate(), lambda logits: logits[:, -1, 1]
    kept = circuit_of(gate, ["L0H0->MLP0", "MLP0->logits"]).kept
    output = circuit_graph(gate).mask("MLP0->logits")
    shares = torch.stack([torch.where(output, share, kept.float()) for share in (0.0, 0.25, 1.0)])
    assert run_edges(gate, shares, [[0]], None, logit, value="zero").per_pair[:, 0].tolist() == [0.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (torch.full((1, 46), 1.5), "numbers between 0 and 1, got 1.5"),
        (torch.full((1, 46), 2), "got 2"),
        (torch.full((46,), -0.5), "got -0.5"),
        (torch.full((1, 46), math.nan), "got NaN or an infinite number"),
        (torch.zeros(46, dtype=torch.complex64), "complex64"),
        (torch.zeros(45, dtype=torch.bool), r"46 edges for this model, .* got \[45\]"),
        (None, r"got None; circuit_of\(model, \[\.\.\.\]\)\.kept"),
        (CHAIN, r"got \['embed->L0H1.v'.* are masks"),
        (circuit_of(MODEL, CHAIN), "got Circuit"),
    ],
)
def test_what_is_no_mask_is_refused_with_what_makes_one(kept, says):
    with refused(hl.HooklensError, says):
        run_edges(MODEL, kept, *PROMPTS)


@pytest.mark.parametrize("given", [None, CHAIN, GRAPH.mask(CHAIN)], ids=["None", "names", "mask"])
@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("measure_faithfulness", lambda circuit: measure_faithfulness(MODEL, circuit, *PROMPTS)),
        ("evaluate_circuit", lambda circuit: evaluate_circuit(MODEL, circuit, *PROMPTS)),
        ("prune_edges", lambda circuit: prune_edges(MODEL, circuit, *PROMPTS, size=3)),
        ("prune_nodes", lambda circuit: prune_nodes(MODEL, circuit, *PROMPTS, size=3)),
        ("prune_edges_below", lambda circuit: prune_edges_below(MODEL, circuit, *PROMPTS, threshold=0.1)),
        ("prune_nodes_below", lambda circuit: prune_nodes_below(MODEL, circuit, *PROMPTS, threshold=0.1)),
        ("transfer_circuit", lambda circuit: transfer_circuit(MODEL, circuit, PAIRS, MODEL, PAIRS)),
    ],
)
def test_what_is_no_circuit_is_refused_with_what_makes_one(name, ask, given):
    with refused(WrongType, rf"{name} needs a Circuit, got \w+; circuit_of\(model, edges\) makes one"):
        ask(given)


@pytest.mark.parametrize("scores", [circuit_of(MODEL, CHAIN), None, torch.ones(46)], ids=["circuit", "None", "tensor"])
def test_a_curve_without_scores_is_refused_with_what_makes_them(scores):
    with refused(WrongType, r"trace_faithfulness needs the EdgeScores .* eap\(\.\.\.\)"):
        trace_faithfulness(MODEL, scores, *PROMPTS)


@pytest.mark.parametrize("ask", [circuit_graph, whole_circuit, lambda model: circuit_of(model, CHAIN)])
@pytest.mark.parametrize("model", [5, None, torch.nn.Linear(2, 2)], ids=["5", "None", "Linear"])
def test_what_is_no_model_is_refused(ask, model):
    with refused(WrongType, "a graph of edges needs a HookedTransformer"):
        ask(model)


@pytest.mark.parametrize("n", [*NOT_NUMBERS, 2.5, 0, -1])
@pytest.mark.parametrize("cut", ["greedy_edges", "top_edges", "top_nodes"])
def test_the_size_of_a_circuit_is_a_whole_number(cut, n):
    with refused(ValueError, "n is a whole number of at least [01], got "):
        getattr(eap(MODEL, *PROMPTS), cut)(n)


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        ("greedy_edges", "n is at most 46: this model has 46 edges; got 47"),
        ("top_edges", "n is at most 46: this model has 46 edges; got 47"),
        ("top_nodes", "n is at most 6: this model has 6 nodes beside the embedding; got 47"),
    ],
)
def test_more_edges_or_nodes_than_there_are_are_refused(cut, says):
    with refused(ValueError, says):
        getattr(eap(MODEL, *PROMPTS), cut)(47)


@pytest.mark.parametrize("threshold", [*NOT_NUMBERS, math.inf])
@pytest.mark.parametrize(
    "ask",
    [
        lambda threshold: eap(MODEL, *PROMPTS).above(threshold),
        lambda threshold: acdc(MODEL, *PROMPTS, threshold=threshold),
        lambda threshold: acdc_nodes(MODEL, *PROMPTS, threshold=threshold),
        lambda threshold: prune_edges_below(MODEL, whole_circuit(MODEL), *PROMPTS, threshold=threshold),
        lambda threshold: prune_nodes_below(MODEL, whole_circuit(MODEL), *PROMPTS, threshold=threshold),
    ],
    ids=["above", "acdc", "acdc_nodes", "prune_edges_below", "prune_nodes_below"],
)
def test_a_threshold_is_a_finite_number(ask, threshold):
    with refused(ValueError, "threshold is a finite number.*, got "):
        ask(threshold)


@pytest.mark.parametrize("prune", [prune_edges, prune_nodes])
@pytest.mark.parametrize(
    ("pace", "says"),
    [
        ({"size": True}, "size is a whole number of at least 1, got True"),
        ({"size": 3, "share": "x"}, "share is a finite number, got 'x'"),
        ({"size": 3, "share": 0.0}, "share is the part cut in a round, between 0 and 1"),
    ],
)
def test_the_pace_of_pruning_is_checked(prune, pace, says):
    with refused(ValueError, says):
        prune(MODEL, whole_circuit(MODEL), *PROMPTS, **pace)
