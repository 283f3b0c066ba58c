"""Carrying edges from one graph to another, matching nodes by role, and the random counterparts."""

from collections import Counter
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.plugins.circuits.carry import Carrier, head_nodes, random_maps, shuffled
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.graph import CircuitGraph
from hooklens.plugins.circuits.matching import match, measure_matching
from hooklens.plugins.circuits.roles import Roles
from hooklens.sweeps.replacement import Zero

SHAPES = [(3, 4, 4, True), (3, 4, 2, True), (2, 6, 3, False), (2, 4, 1, True, True)]


def circuit(graph: CircuitGraph, edges, scores=None) -> Circuit:
    kept = graph.mask(edges)
    return Circuit(graph, kept, kept.double() if scores is None else scores, "by hand", Zero(), "source", 0, [])


def random_circuit(graph: CircuitGraph, seed: int, share: float = 0.15) -> Circuit:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(graph.n_edges, generator=draw, dtype=torch.float64)
    return circuit(graph, (torch.rand(graph.n_edges, generator=draw) < share).nonzero().flatten().tolist(), scores)


def roles(graph: CircuitGraph, effect, labels=None) -> Roles:
    names = ["embedding", *("unlabelled" if graph.is_head(n) else "MLP" for n in range(1, graph.n_sources))]
    for name, label in (labels or {}).items():
        names[graph.source_names.index(name)] = label
    if isinstance(effect, dict):
        effect = torch.tensor([effect.get(name, 0.0) for name in graph.source_names], dtype=torch.float64)
    return Roles(graph, names, torch.zeros(graph.n_sources, 4, dtype=torch.float64), effect, "zero", 4)


def random_roles(graph: CircuitGraph, seed: int) -> Roles:
    draw = torch.Generator().manual_seed(seed)
    found = roles(graph, torch.rand(graph.n_sources, generator=draw, dtype=torch.float64))
    kinds = ["induction", "previous token", "induction, name mover", "unlabelled"]
    for node in head_nodes(graph).tolist():
        found.labels[node] = kinds[int(torch.randint(4, (1,), generator=draw))]
    return found


def placed(carrier: Carrier, **places: str) -> torch.Tensor:
    found = carrier.fixed()
    for name, other in places.items():
        found[carrier.source.source_names.index(name)] = carrier.target.source_names.index(other)
    return found


def carried(carrier: Carrier, found: torch.Tensor) -> list[str]:
    return [carrier.target.name(int(e)) for e in carrier.masks(found[None])[0].nonzero()]


@pytest.mark.parametrize("shape", SHAPES)
def test_to_the_same_graph_every_edge_stays(shape):
    graph = CircuitGraph(*shape)
    for seed in range(5):
        given = random_circuit(graph, seed)
        carrier = Carrier(given, graph)
        same = torch.arange(graph.n_sources + 1)
        assert torch.equal(carrier.masks(same[None])[0], given.kept)
        assert int(carrier.count(same[None])) == given.n_edges and float(carrier.lost(same[None])) == 0
        assert torch.equal(carrier.scores(given, same), torch.where(given.kept, given.scores, 0.0))
        assert float(carrier.weight.sum()) == pytest.approx(1)


def test_edges_are_carried_by_the_names_of_their_ends():
    edges = ["embed->L0H1.v", "L0H1->MLP0", "L0H1->L1H0.k", "MLP0->L1H0.q", "L1H0->logits"]
    carrier = Carrier(circuit(CircuitGraph(2, 2, 2), edges), CircuitGraph(4, 3, 3))
    found = placed(carrier, L0H1="L1H2", MLP0="MLP2", L1H0="L3H0")
    there = ["embed->L1H2.v", "L1H2->MLP2", "L1H2->L3H0.k", "MLP2->L3H0.q", "L3H0->logits"]
    assert carried(carrier, found) == sorted(there, key=lambda name: carrier.target.numbers(name))


def test_an_edge_that_runs_backwards_is_lost_and_named():
    scores = torch.zeros(46, dtype=torch.float64)
    graph = CircuitGraph(2, 2, 2)
    edges = ["embed->L0H1.v", "L0H1->MLP0", "L0H1->L1H0.k", "L1H0->logits"]
    scores[graph.numbers(edges)] = torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=torch.float64)
    given = circuit(graph, edges, scores)
    carrier = Carrier(given, CircuitGraph(2, 2, 2, parallel=True))
    found = placed(carrier, L0H1="L1H1", MLP0="MLP1", L1H0="L0H0")
    assert set(carried(carrier, found)) == {"L0H0->logits", "embed->L1H1.v"}
    assert float(carrier.lost(found[None])) == pytest.approx(0.5)  # (2 + 3) of 10; a parallel MLP reads no head
    result = measure_matching(carrier, found, roles(graph, {}), roles(carrier.target, {}))
    assert result.lost == ["L0H1->MLP0", "L0H1->L1H0.k"] and result.n_edges == 4


def test_shared_keys_become_keys_of_each_head_that_reads_them():
    edges = ["embed->L0G0.k", "embed->L0H0.q", "L0H0->logits", "L0H1->logits", "embed->L0G1.v"]
    carrier = Carrier(circuit(CircuitGraph(1, 4, 2), edges), CircuitGraph(1, 4, 4))
    assert [carrier.source.source_names[i] for i in carrier.heads] == ["L0H0", "L0H1", "L0H2"]  # nobody reads L0G1.v
    found = placed(carrier, L0H0="L0H3", L0H1="L0H1", L0H2="L0H0")
    there = {"embed->L0H3.k", "embed->L0H1.k", "embed->L0H3.q", "L0H3->logits", "L0H1->logits", "embed->L0H0.v"}
    assert set(carried(carrier, found)) == there


def test_keys_of_heads_that_come_to_share_become_one():
    edges = ["embed->L0H0.k", "embed->L0H1.k", "L0H0->logits", "L0H1->logits"]
    scores = torch.zeros(CircuitGraph(1, 4, 4).n_edges, dtype=torch.float64)
    given = circuit(CircuitGraph(1, 4, 4), edges)
    scores[given.graph.numbers(edges)] = torch.tensor([1.0, -5.0, 1.0, 1.0], dtype=torch.float64)
    carrier = Carrier(circuit(given.graph, edges, scores), CircuitGraph(1, 4, 2))
    together = placed(carrier, L0H0="L0H3", L0H1="L0H2")
    assert set(carried(carrier, together)) == {"embed->L0G1.k", "L0H3->logits", "L0H2->logits"}
    assert int(carrier.count(together[None])) == 3 and float(carrier.lost(together[None])) == 0
    there = carrier.scores(circuit(given.graph, edges, scores), together)
    assert float(there[carrier.target.numbers("embed->L0G1.k")]) == -5.0
    apart = placed(carrier, L0H0="L0H3", L0H1="L0H0")
    assert int(carrier.count(apart[None])) == 4


# -- random counterparts


@given(st.integers(0, 1000), st.sampled_from(SHAPES), st.sampled_from(SHAPES))
@settings(deadline=None, max_examples=8)
def test_random_maps_keep_the_number_of_edges(seed, shape, other):
    source, target = CircuitGraph(*shape), CircuitGraph(*other)
    given = random_circuit(source, seed, share=0.05)
    heads = Carrier(given, source).heads
    if not heads or len(heads) > target.n_layers * target.n_heads:
        return
    carrier = Carrier(given, target)
    found = match(carrier, random_roles(source, seed), random_roles(target, seed + 1))
    for draw in (random_maps, shuffled):
        maps = draw(carrier, found, 20, seed=seed)
        assert carrier.count(maps).tolist() == [int(carrier.count(found[None]))] * 20
        assert torch.equal(carrier.masks(maps).sum(1), carrier.count(maps))
        for one in maps:
            there = one[carrier.heads].tolist()
            assert len(set(there)) == len(there) and all(target.is_head(t) for t in there)
            others = [node for node in range(source.n_sources + 1) if node not in carrier.heads]
            assert torch.equal(one[others], found[others])
        assert torch.equal(maps, draw(carrier, found, 20, seed=seed))
    wide = target.n_heads + target.mlp
    layers = [(maps[:, node] - 1) // wide for node in carrier.heads]
    assert all((at == (int(found[node]) - 1) // wide).all() for at, node in zip(layers, carrier.heads, strict=True))


def test_random_maps_reach_every_place_alike():
    graph = CircuitGraph(3, 2, 2, mlp=False)
    carrier = Carrier(circuit(graph, ["embed->L0H0.v", "L0H0->L1H1.k", "L1H1->logits"]), graph)
    maps = random_maps(carrier, placed(carrier, L0H0="L0H0", L1H1="L1H1"), 1200)
    ends = Counter(tuple(row) for row in maps[:, carrier.heads].tolist())
    assert len(ends) == 12 and min(ends.values()) > 60  # the sender in an earlier layer: 3 pairs of layers, 4 of heads


def test_random_maps_reach_other_layers_where_heads_share_keys():
    graph = CircuitGraph(3, 4, 2, mlp=False)
    carrier = Carrier(circuit(graph, ["embed->L0G0.k", "L0H0->logits", "L0H1->logits"]), graph)
    maps = random_maps(carrier, placed(carrier, L0H0="L0H0", L0H1="L0H1"), 600)
    ends = Counter(tuple(row) for row in maps[:, carrier.heads].tolist())
    assert len(ends) == 12 and min(ends.values()) > 25  # both in one group of six, in either order


# -- matching


def test_labels_come_first_then_effects():
    graph = CircuitGraph(1, 4, 4, mlp=False)
    edges = [f"L0H{h}->logits" for h in range(3)]
    source = roles(
        graph, {"L0H0": 0.9, "L0H1": 0.5, "L0H2": 0.1}, {"L0H0": "induction", "L0H1": "induction, name mover"}
    )
    target = roles(
        graph, {"L0H0": 0.9, "L0H1": 0.1, "L0H2": 0.2, "L0H3": 0.5}, {"L0H1": "induction", "L0H2": "name mover"}
    )
    carrier = Carrier(circuit(graph, edges), graph)
    result = measure_matching(carrier, match(carrier, source, target), source, target)
    assert dict(zip(result.source, result.target, strict=True)) == {"L0H0": "L0H1", "L0H1": "L0H2", "L0H2": "L0H3"}
    assert (result.same_label, result.labelled) == (1, 2)
    assert result.distance.tolist() == pytest.approx([0.8, 0.3, 0.4])


def test_an_edge_that_can_exist_outweighs_a_small_difference_in_effect():
    graph = CircuitGraph(2, 2, 2, mlp=False)
    carrier = Carrier(circuit(graph, ["embed->L0H0.v", "L0H0->L1H0.k", "L1H0->logits"]), graph)
    source = roles(graph, {"L0H0": 0.50, "L1H0": 0.70})
    target = roles(graph, {"L1H0": 0.50, "L0H0": 0.70, "L0H1": 0.45, "L1H1": 0.65})
    found = match(carrier, source, target)
    assert found[carrier.heads].tolist() == [2, 4]  # L0H1 and L1H1, though L1H0 and L0H0 have the very same effects
    far = roles(graph, {"L1H0": 0.50, "L0H0": 0.70, "L0H1": -0.45, "L1H1": 0.0})
    assert match(carrier, source, far)[carrier.heads].tolist() == [3, 1]  # a third of the circuit is lost


def test_mlps_go_by_depth_and_some_stay_alone():
    graph, shallow = CircuitGraph(4, 1, 1), CircuitGraph(2, 1, 1)
    edges = ["embed->L0H0.v", *(f"MLP{i}->logits" for i in range(4)), "L0H0->logits"]
    carrier = Carrier(circuit(graph, edges), shallow)
    source = roles(graph, {"MLP0": 0.5, "MLP1": 0.01, "MLP2": 0.02, "MLP3": 0.4})
    target = roles(shallow, {"MLP0": 0.5, "MLP1": 0.4})
    found = match(carrier, source, target)
    result = measure_matching(carrier, found, source, target)
    places = dict(zip(result.source, result.target, strict=True))
    assert places["MLP0"] == "MLP0" and places["MLP3"] == "MLP1" and places["MLP1"] == places["MLP2"] == ""
    assert result.lost == ["MLP1->logits", "MLP2->logits"]
    assert [row[3] for row in result.table().rows if row[0] == "MLP1"] == ["none"]
    assert len(result.figure().data) > 0 and len(result.top(2)) == 2
    to_heads_only = Carrier(circuit(graph, edges), CircuitGraph(2, 1, 1, mlp=False))
    found = match(to_heads_only, source, roles(CircuitGraph(2, 1, 1, mlp=False), {}))
    assert int(to_heads_only.count(found[None])) == 2


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=25)
def test_the_assignment_is_the_best_there_is(seed):
    graph, target = CircuitGraph(1, 3, 3, mlp=False), CircuitGraph(2, 3, 3, mlp=False)
    carrier = Carrier(circuit(graph, [f"L0H{h}->logits" for h in range(3)]), target)  # nothing that could be lost
    ours, theirs = random_roles(graph, seed), random_roles(target, seed + 1)

    def differ(a, b):
        return 0.5 if a != b and {"unlabelled"} in (a, b) else 1 - len(a & b) / len(a | b)

    def cost(places):
        labels = [{*ours.labels[1 + i].split(", ")} for i in range(3)]
        others = [{*theirs.labels[1 + j].split(", ")} for j in places]
        apart = sum(differ(a, b) for a, b in zip(labels, others, strict=True))
        gaps = [float((ours.effect[1 + i] - theirs.effect[1 + j]).abs()) for i, j in enumerate(places)]
        return apart, sum(gap + gap**2 + 0.01 * (j // 3) for gap, j in zip(gaps, places, strict=True))

    found = (match(carrier, ours, theirs)[1:4] - 1).tolist()
    best = min(map(cost, permutations(range(6), 3)))
    assert cost(found) == pytest.approx(best)


@given(st.integers(0, 10_000), st.sampled_from([(3, 4, 4, True), (2, 6, 6, False)]))
@settings(deadline=None, max_examples=8)
def test_how_heads_are_numbered_does_not_matter(seed, shape):
    graph = CircuitGraph(*shape)
    given = random_circuit(graph, seed, share=0.08)
    ours, theirs = random_roles(graph, seed), random_roles(graph, seed + 1)
    draw = torch.Generator().manual_seed(seed)
    to = torch.arange(graph.n_sources + 1)  # where each node of the target goes
    for layer in range(graph.n_layers):
        at = graph.heads_at(layer)
        to[at] = to[at][torch.randperm(graph.n_heads, generator=draw)]
    back = to.argsort()[:-1]
    renamed = Roles(graph, [theirs.labels[i] for i in back], theirs.attention[back], theirs.effect[back], "zero", 4)
    carrier = Carrier(given, graph)
    if not carrier.nodes:
        return
    one, other = match(carrier, ours, theirs), match(carrier, ours, renamed)
    nodes = carrier.nodes
    assert torch.equal(to[one[nodes]], other[nodes])
