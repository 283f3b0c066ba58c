"""Which edges there are: the published counts, and what a frozen model's readers really see."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.zoo import ZOO, zoo_model

import hooklens as hl
from hooklens.plugins.circuits.graph import CircuitGraph, circuit_graph
from hooklens.testing import tiny_model

TOKENS = torch.tensor([[1, 5, 2, 7]])


@pytest.mark.parametrize(
    ("graph", "edges"),
    [
        (CircuitGraph(12, 12, 12), 32_491),
        (CircuitGraph(4, 8, 8, mlp=False), 1_281),
        (CircuitGraph(2, 8, 8, mlp=False), 257),
        (CircuitGraph(1, 4, 4), 23),
        (CircuitGraph(30, 9, 3), 70_651),
        (CircuitGraph(1, 1, 1, mlp=False), 5),
    ],
)
def test_the_known_counts(graph, edges):
    assert graph.n_edges == edges
    assert graph.table().rows[-1] == ("all", edges)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
@settings(deadline=None)
def test_every_edge_has_a_name_of_its_own(layers, groups, each, mlp, parallel):
    graph = CircuitGraph(layers, groups * each, groups, mlp, parallel)
    names = [graph.name(e) for e in range(graph.n_edges)]
    assert len(set(names)) == graph.n_edges
    assert graph.numbers(names) == list(range(graph.n_edges))
    sources, receivers = graph.ends
    assert len(graph.receiver_names) == len(graph.receivers) == int(receivers.max()) + 1
    assert len(graph.source_names) == graph.n_sources == int(sources.max()) + 1


def readers(graph: CircuitGraph, cache) -> list[torch.Tensor]:
    """What every receiver reads, in the graph's order."""
    found = []
    for slot in graph.slots:
        if slot.kind == "attn":
            for which in "qkv":
                found += list(cache[f"blocks.{slot.layer}.hook_{which}_input"].unbind(2))
        else:
            at = "hook_mlp_in" if slot.kind == "mlp" else "hook_resid_post"
            found.append(cache[f"blocks.{min(slot.layer, graph.n_layers - 1)}.{at}"])
    return found


def where(source: str) -> str:
    """The point at which a node's output can be moved: all heads of a layer write into attn_out."""
    if source == "embed":
        return "hook_embed"
    layer = int(re.findall(r"\d+", source)[0])
    return f"blocks.{layer}.hook_{'mlp' if 'MLP' in source else 'attn'}_out"


@pytest.mark.parametrize("name", [n for n in ZOO if ZOO[n].get("block") != "post"])
def test_an_edge_is_where_a_reader_sees_a_node_while_all_others_are_held(name):
    model = zoo_model(name, dtype=torch.float64)
    graph = circuit_graph(model)
    inputs = [n for n in model.hook_names() if n.endswith(("q_input", "k_input", "v_input", "mlp_in", "resid_post"))]
    outputs = [n for n in model.hook_names() if n.endswith(("attn_out", "mlp_out"))]
    _, clean = model.run_with_cache(TOKENS, [*inputs, *outputs])
    before = readers(graph, clean)
    seen = 0
    for source in graph.source_names:
        at = where(source)
        held = [(n, lambda act, hook: clean[hook.name]) for n in outputs if n != at]
        moved = (at, lambda act, hook, at=at: (clean[at] if at in outputs else act) + 1.0)
        with model.hooks(fwd_hooks=[*held, moved]):
            _, cache = model.run_with_cache(TOKENS, inputs)
        changed = [not torch.equal(a, b) for a, b in zip(before, readers(graph, cache), strict=True)]
        edges = map(graph.name, range(graph.n_edges))
        mine = {name.partition("->")[2] for name in edges if name.startswith(f"{source}->")}
        assert {n for n, c in zip(graph.receiver_names, changed, strict=True) if c} == mine
        seen += sum(changed)
    assert seen == graph.n_edges


def test_paths():
    graph = CircuitGraph(2, 2, 1)
    whole = graph.mask(["embed->L0H0.q", "L0H0->MLP1", "MLP1->logits"])
    loose = graph.mask(["embed->L0H1.q", "MLP0->logits", "L0H0->L1H0.q"])  # unread; unfed; unread
    assert torch.equal(graph.on_a_path((whole | loose)[None])[0], whole)
    shared = graph.mask(["embed->L0G0.v", "L0H1->logits"])  # either head reads by the shared values
    assert torch.equal(graph.on_a_path(shared[None])[0], shared)
    unfed = graph.mask(["MLP0->logits"])
    assert torch.equal(graph.on_a_path(unfed[None], rooted=False)[0], unfed)
    assert not graph.on_a_path(unfed[None]).any()


@given(st.integers(0, 10_000), st.floats(0.02, 0.5))
@settings(deadline=None, max_examples=40)
def test_an_edge_is_on_a_path_where_walking_finds_one(seed, share):
    graph = CircuitGraph(3, 4, 2)
    kept = torch.rand(1, graph.n_edges, generator=torch.Generator().manual_seed(seed)) < share
    edges = [graph.name(int(e)).split("->") for e in kept[0].nonzero()]

    def reads_by(receiver: str) -> set[str]:
        node = receiver.partition(".")[0]
        if "G" not in node:
            return {node}
        layer, _, number = node.partition("G")
        return {f"{layer}H{2 * int(number) + i}" for i in range(2)}

    forward, backward = {"embed"}, {"logits"}
    for _ in range(10):
        forward |= {n for a, b in edges if a in forward for n in reads_by(b)}
        backward |= {a for a, b in edges if reads_by(b) & backward}
    good = [a in forward and bool(reads_by(b) & backward) for a, b in edges]
    assert graph.on_a_path(kept)[0][kept[0]].tolist() == good


def test_masks_of_nodes():
    graph = CircuitGraph(2, 2, 2, mlp=False)
    nodes = torch.zeros(1, graph.n_sources, dtype=torch.bool)
    nodes[0, [0, 1]] = True
    kept = [graph.name(int(e)) for e in graph.of_nodes(nodes)[0].nonzero()]
    assert kept == ["embed->L0H0.q", "embed->L0H0.k", "embed->L0H0.v", "embed->logits", "L0H0->logits"]


def test_what_cannot_be_a_graph_or_an_edge_is_refused():
    with pytest.raises(hl.HooklensError, match="post-norm"):
        circuit_graph(tiny_model(block="post"))
    graph = CircuitGraph(2, 2, 2)
    with pytest.raises(KeyError, match="L0H1"):
        graph.numbers("L0H11->logits")
    with pytest.raises(KeyError, match=r"L1H0\.q"):
        graph.numbers("embed->L1H0.w")
    with pytest.raises(ValueError, match="reads before"):
        graph.numbers("L1H0->L0H0.q")
    with pytest.raises(ValueError, match="source->receiver"):
        graph.numbers("embed")
    with pytest.raises(ValueError, match="0 to"):
        graph.mask([10_000])
