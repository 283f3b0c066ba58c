"""Faithfulness, completeness, minimality and their random circuits; circuits on paper."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import resealed
from test_circuit_run import CLEAN, CORRUPTED, diff

from hooklens.core.errors import FileRefused, InputError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.metrics import kl
from hooklens.plugins.circuits.circuit import Circuit, circuit_of, whole_circuit
from hooklens.plugins.circuits.curve import trace_faithfulness
from hooklens.plugins.circuits.edge_attribution import eap
from hooklens.plugins.circuits.evaluation import evaluate_circuit
from hooklens.plugins.circuits.faithfulness import measure_faithfulness
from hooklens.plugins.circuits.graph import CircuitGraph
from hooklens.plugins.circuits.minimality import _worth
from hooklens.plugins.circuits.random_draws import random_circuits, subsets
from hooklens.plugins.circuits.run import Bench, run_edges
from hooklens.plugins.patching.path import path_patch
from hooklens.sweeps.nodes import read_receivers, read_senders
from hooklens.testing import and_gate, or_gate, tiny_model


def logit(logits):
    return logits[:, -1, 1]


def kinds(graph: CircuitGraph, kept: torch.Tensor) -> Counter:
    """How many edges there are between each two layers, by kind."""
    found = Counter()
    for edge in kept.nonzero().flatten().tolist():
        source, _, receiver = graph.name(edge).partition("->")
        at, to = (end.partition("H")[0].partition("G")[0] for end in (source, receiver))
        found[at, to, receiver.rpartition(".")[2]] += 1
    return found


SHAPES = [
    (3, 4, 4, True),
    (3, 4, 2, True),
    (2, 6, 3, False),
    (3, 4, 4, True, False, True),
    (3, 4, 2, True, False, True),
]


@given(st.integers(0, 1000), st.sampled_from(SHAPES), st.booleans())
@settings(deadline=None, max_examples=30)
def test_random_circuits_keep_size_profile_and_connectivity(seed, shape, tidy):
    graph = CircuitGraph(*shape)
    kept = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(seed)) < 0.25
    kept = graph.on_a_path(kept[None])[0] if tidy else kept
    if not kept.any():
        return
    draws = random_circuits(graph, kept, 5, seed=seed)  # the last two shapes: heads that share a norm
    assert draws.sum(1).tolist() == [int(kept.sum())] * 5
    assert all(kinds(graph, draw) == kinds(graph, kept) for draw in draws)
    if tidy:
        assert torch.equal(graph.on_a_path(draws), draws)
    assert torch.equal(draws, random_circuits(graph, kept, 5, seed=seed))


def test_random_circuits_reach_every_place_alike():
    graph = CircuitGraph(2, 4, 4, mlp=False)
    kept = graph.mask(["embed->L0H1.v", "L0H1->L1H2.q", "L1H2->logits"])
    draws = random_circuits(graph, kept, 800)
    paths = Counter(tuple(graph.name(int(e)) for e in draw.nonzero()) for draw in draws)
    assert len(paths) == 16 and min(paths.values()) > 20  # 50 each on average
    wide = graph.mask([f"embed->L0H{h}.{x}" for h in range(2) for x in "qk"] + ["L0H0->logits", "L0H1->logits"])
    share = random_circuits(graph, wide, 800).float().mean(0)
    same = [share[graph.numbers([f"embed->L0H{h}.q" for h in range(4)])], share[graph.numbers("L0H3->logits")]]
    assert all(bool(((x - 0.5).abs() < 0.08).all()) for x in same)


def test_a_circuit_that_is_fed_by_nothing_is_matched_as_it_is():
    graph = CircuitGraph(1, 4, 4)
    draws = random_circuits(graph, graph.mask(["L0H0->MLP0", "MLP0->logits"]), 50)
    assert {graph.name(int(draw.nonzero()[0])) for draw in draws} == {f"L0H{h}->MLP0" for h in range(4)}
    with pytest.raises(ValueError, match="no edges"):
        random_circuits(graph, graph.mask([]))


@pytest.mark.slow
def test_the_whole_model_is_faithful_and_complete():
    model = tiny_model(dtype=torch.float64)
    found = evaluate_circuit(model, whole_circuit(model), CLEAN, CORRUPTED, diff)
    assert found.faithfulness.value == pytest.approx(1.0) and found.faithfulness.p == 1.0  # all random ones are it
    assert found.faithfulness.overlap == 1.0 and found.completeness.worst == pytest.approx(0.0, abs=1e-12)
    assert found.minimality.effect.shape == (46,) and len(found.faithfulness.random) == 100


def test_an_and_gate_s_path_is_faithful_minimal_and_beats_chance():
    gate = and_gate()
    path = circuit_of(gate, ["embed->L0H0.v", "L0H0->MLP0", "MLP0->logits"])
    clean, corrupted = [[1, 1, 1], [1, 1, 1]], [[1, 0, 1], [0, 1, 1]]
    found = evaluate_circuit(gate, path, clean, corrupted, logit)
    assert found.faithfulness.value == pytest.approx(1.0)
    assert found.minimality.effect.tolist() == pytest.approx([1.0] * 3) and found.minimality.idle == []
    assert found.completeness.worst == pytest.approx(0.0, abs=1e-9)


def test_half_of_an_or_gate_is_faithful_and_not_complete():
    gate = or_gate()
    half = circuit_of(gate, ["L0H0->MLP0", "MLP0->logits"], value="zero")
    found = evaluate_circuit(gate, half, [[0], [1]], None, logit)
    assert found.faithfulness.value == 1.0
    # without L0H0 the circuit says 0, and the model, which has L0H1, still 1
    assert found.completeness.worst == 1.0 and "L0H0->MLP0" in found.completeness.greedy_edges
    assert found.faithfulness.p == 1.0  # the random circuits are the same half or the other


def test_an_or_gate_s_head_edge_is_worth_1_without_the_other_and_0_beside_it():
    """Wang et al.: an edge is not idle if there is any K without which it is needed; with K empty both would be."""
    gate = or_gate()
    both = circuit_of(gate, ["L0H0->MLP0", "L0H1->MLP0", "MLP0->logits"], value="zero")
    found = evaluate_circuit(gate, both, [[0], [1]], None, logit).minimality
    worth = dict(
        zip(found.edges, zip(found.effect.tolist(), found.alone.tolist(), found.given, strict=True), strict=True)
    )
    assert worth["L0H0->MLP0"] == (1.0, 0.0, "L0H1's edges") and worth["L0H1->MLP0"] == (1.0, 0.0, "L0H0's edges")
    assert worth["MLP0->logits"] == (1.0, 1.0, "nothing") and found.idle == []


def test_an_edge_s_worth_is_what_cutting_it_and_the_set_says():
    model = tiny_model(dtype=torch.float64)
    circuit = whole_circuit(model)
    bench = Bench(model, PromptPairs(CLEAN, CORRUPTED, diff), "corrupted")
    sets, _ = subsets(circuit.graph, circuit.kept, 6, torch.Generator().manual_seed(1))
    edges = torch.tensor([3, 17, 45])
    found = _worth(bench, circuit.kept[None], sets[None], edges[None])[0]
    for i, edge in enumerate(edges.tolist()):
        for j, K in enumerate(sets):
            left = circuit.without([e for e in K.nonzero().flatten().tolist() if e != edge])
            runs = [one.run(model, CLEAN, CORRUPTED, diff).per_pair[0] for one in (left, left.without([edge]))]
            torch.testing.assert_close(found[i, j], runs[0] - runs[1], atol=1e-12, rtol=0)
    assert bool(sets[:, edges].any()) and not bool(sets[0].any())


@pytest.mark.slow
def test_completeness_searches_nodes_and_forty_sets_and_measures_the_complement():
    """One head of an OR gate: the other edges alone do the task. All the model: nothing is left outside."""
    gate = or_gate()
    found = evaluate_circuit(gate, circuit_of(gate, ["L0H0->MLP0"], value="zero"), [[0], [1]], None, logit)
    assert found.faithfulness.value == 0.0 and found.completeness.complement == 1.0
    assert (found.completeness.complement_low, found.completeness.complement_high) == (1.0, 1.0)
    model = tiny_model(dtype=torch.float64)
    pairs = demo_pairs(model, 4)
    half = eap(model, pairs[:2]).top_edges(20)
    found = evaluate_circuit(model, half, pairs[2:]).completeness
    outside = run_edges(model, ~half.kept, pairs[2:]).faithfulness
    assert found.complement == pytest.approx(float(outside[0])) and 0 < found.complement_p <= 1
    assert len(found.random) == 40 and len(found.complement_null) == 100
    writers = {name for name in half.senders if name != "embed"}
    assert {f"{name}'s edges" for name in writers} <= set(found.kinds)
    assert {kind.partition(" ")[2] for kind in found.kinds} >= {"nodes at random", "edges at random"}


def test_faithfulness_is_what_its_formula_says_on_pairs_not_seen():
    model = tiny_model(dtype=torch.float64)
    pairs = demo_pairs(model, 6)
    circuit = eap(model, pairs[:3]).top_edges(20)
    clean, corrupted = pairs[2:].clean, pairs[2:].corrupted
    metric = kl(model, clean)
    found = measure_faithfulness(model, circuit, clean, corrupted, metric, group=torch.tensor([0, 0, 1, 1]), seed=3)
    runs = run_edges(model, circuit.kept, clean, corrupted, metric)
    with torch.no_grad():
        empty, whole = metric(model(corrupted)).mean(), metric(model(clean)).mean()
    expected = float((runs.per_pair[0].mean() - empty) / (whole - empty))
    assert found.n_seen == 1 and found.defined and found.value == pytest.approx(expected, abs=1e-9)
    low, high = found.interval()
    assert low <= found.value <= high
    closer = ((1 - found.random).abs() <= abs(1 - found.value)).sum()
    assert found.p == pytest.approx((int(closer) + 1) / 101)
    again = random_circuits(circuit.graph, circuit.kept, 100, seed=3)
    drawn = run_edges(model, again, clean, corrupted, metric)
    torch.testing.assert_close(found.random_per_pair, drawn.per_pair)


def test_without_a_difference_nothing_is_faithful():
    model = tiny_model()
    found = measure_faithfulness(model, circuit_of(model, ["embed->logits"]), CLEAN, CLEAN, diff)
    assert not found.defined and found.value != found.value and found.p != found.p


def test_a_curve_grows_to_the_model():
    model = tiny_model(dtype=torch.float64)
    pairs = demo_pairs(model, 4)
    scores = eap(model, pairs[:2])
    n = scores.graph.n_edges
    curve = trace_faithfulness(model, scores, pairs[2:], sizes=[10, 20, 30, n])
    assert float(curve.values[-1]) == pytest.approx(1.0) and int(curve.sizes[-1]) == n and curve.n_seen == 0
    x, y = [0, *curve.sizes.tolist()], [0.0, *curve.values.tolist()]
    by_hand = sum((b - a) * (u + v) / 2 for a, b, u, v in zip(x, x[1:], y, y[1:], strict=False)) / n
    assert curve.area == pytest.approx(by_hand)
    assert curve.random.shape == (100, len(curve.sizes)) and 0 < curve.p <= 1
    assert len(curve.figure().data) == 4 and len(curve.table()) == len(curve.sizes)


def test_json_loads_back_and_runs(tmp_path):
    model = tiny_model(n_heads=4, n_key_value_heads=2, dtype=torch.float64)
    circuit = eap(model, CLEAN, CORRUPTED, diff).top_edges(30)
    back = Circuit.load_json(circuit.save_json(tmp_path / "circuit.json"))
    assert (
        back.edges == circuit.edges
        and back.found_on == circuit.found_on
        and str(back.replacement) == str(circuit.replacement)
    )
    assert torch.equal(back.scores, circuit.scores)
    a, b = (one.run(model, CLEAN, CORRUPTED, diff).per_pair for one in (circuit, back))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"2 layers of 4 heads \(2 for keys and values\), MLPs; the model 'tiny' has"):
        back.run(tiny_model(), CLEAN, CORRUPTED, diff)


@pytest.mark.parametrize(
    "damage",
    [
        lambda held: [],
        lambda held: held | {"edges": {"embed->L9H9.q": 1.0}},
        lambda held: held | {"edges": held["edges"] | {"embed->logits ": 1.0}},
        lambda held: held | {"edges": {"embed->logits": "nan"}},
        lambda held: held | {"graph": held["graph"] | {"n_layers": 0}},
        lambda held: {name: value for name, value in held.items() if name != "method"},
    ],
)
def test_a_file_that_is_no_circuit_is_refused(tmp_path, damage):
    path = circuit_of(tiny_model(), ["embed->logits"]).save_json(tmp_path / "circuit.json")
    path.write_bytes(resealed(path.read_bytes(), damage))
    with pytest.raises((FileRefused, InputError), match=r"cannot read a circuit|a graph of"):
        Circuit.load_json(path)
    path.write_text("{")
    with pytest.raises(FileRefused):
        Circuit.load_json(path)
    with pytest.raises(ValueError, match="no such file"):
        Circuit.load_json(tmp_path / "none.json")


@pytest.mark.parametrize("sizes", [{"n_layers": 10**9}, {"n_heads": 10**9, "n_kv_heads": 1}, {"n_layers": 9000}])
def test_a_small_file_does_not_stand_for_a_graph_that_exhausts_memory(tmp_path, sizes):
    path = circuit_of(tiny_model(), ["embed->logits"]).save_json(tmp_path / "circuit.json")
    path.write_bytes(resealed(path.read_bytes(), lambda held: held | {"graph": held["graph"] | sizes}))
    assert path.stat().st_size < 600
    with pytest.raises(InputError, match=r"a graph of .* was asked for"):
        Circuit.load_json(path)


@pytest.mark.parametrize("changes", [{"n_key_value_heads": 2}, {}, {"attn_only": True}])
def test_path_patching_takes_a_circuit_s_nodes_by_their_names(changes):
    model = tiny_model(n_heads=4, **changes)
    pairs = demo_pairs(model, 2)
    circuit = eap(model, pairs).top_edges(40)
    found = path_patch(model, pairs, senders=circuit.senders, receivers=[*circuit.receivers, "logits"])
    assert [sender.name for sender in read_senders(model, circuit.senders)] == circuit.senders
    names = [one.name for one in read_receivers(model, circuit.receivers)]
    assert names == [name.replace("logits", "final") for name in circuit.receivers]
    assert found.effect.numel() == len(circuit.senders)


def test_nodes_of_later_layers_come_later():
    model = tiny_model(n_layers=11, n_heads=2, n_key_value_heads=1)
    edges = ["embed->L10G0.k", "embed->L2G0.k", "L2H0->L10H1.q", "L10H1->logits", "L2H1->MLP9", "MLP9->logits"]
    assert circuit_of(model, edges).nodes == ["L2G0", "L10G0", "embed", "L2H0", "L2H1", "MLP9", "L10H1"]


def test_a_circuit_draws_its_key_heads():
    model = tiny_model(n_heads=4, n_key_value_heads=2)
    circuit = circuit_of(model, ["embed->L0G1.v", "L0H3->MLP1", "MLP1->logits"])
    assert circuit.nodes == ["L0G1", "embed", "L0H3", "MLP1"]
    figure = circuit.figure()
    assert {a.text for a in figure.layout.annotations} == {"embed", "L0G1", "L0H3", "MLP1", "logits"}
    assert any(trace.line.dash == "dot" for trace in figure.data)
