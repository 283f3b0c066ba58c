"""ACDC and pruning: gates, and the same outcome as one trial after the other and as auto-circuit's."""

import pytest
import torch
from model.parity import transformer_lens_model
from recorded_circuits import ACDC
from test_circuit_run import CLEAN, CORRUPTED, diff

import hooklens as hl
from hooklens.data.demo_prompts import demo_pairs
from hooklens.plugins.circuits.circuit import circuit_of, whole_circuit
from hooklens.plugins.circuits.discovery import acdc, acdc_nodes
from hooklens.plugins.circuits.edge_attribution import eap
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.plugins.circuits.pruning import prune_edges, prune_edges_below, prune_nodes, prune_nodes_below
from hooklens.plugins.circuits.run import run_edges
from hooklens.testing import and_gate, or_gate, tiny_model


def logit(logits):
    return logits[:, -1, 1]


def test_an_or_gate_keeps_exactly_one_head():
    found = acdc(or_gate(), [[0]], None, logit, threshold=0.1, value="zero")
    assert found.kept == ["MLP0->logits", "L0H0->MLP0"]
    assert found.metric_of_circuit == found.base == 1.0 and found.empty == 0.0
    assert acdc_nodes(or_gate(), [[0]], None, logit, threshold=0.1, value="zero").kept == ["MLP0", "L0H0"]


def test_an_and_gate_keeps_the_one_path():
    found = acdc(and_gate(), [[1, 1, 1]], [[1, 0, 1]], logit, threshold=0.1)
    assert found.circuit.edges == ["embed->L0H0.v", "L0H0->MLP0", "MLP0->logits"]
    assert acdc_nodes(and_gate(), [[1, 1, 1]], [[1, 0, 1]], logit, threshold=0.1).kept == ["MLP0", "L0H0", "embed"]


def one_after_the_other(model, metric, threshold: float, ablation: str) -> tuple[torch.Tensor, int]:
    """Every edge tried by itself, from the logits down, with a run of its own."""
    graph = circuit_graph(model)
    kept = torch.ones(graph.n_edges, dtype=torch.bool)
    value = run_edges(model, kept, CLEAN, CORRUPTED, metric, value=ablation).per_pair.mean()
    for edge in reversed(range(graph.n_edges)):
        tried = kept.clone()
        tried[edge] = False
        after = run_edges(model, tried, CLEAN, CORRUPTED, metric, value=ablation).per_pair.mean()
        if value - after < threshold:
            kept, value = tried, after
    return kept, graph.n_edges


@pytest.mark.parametrize(
    ("threshold", "ablation", "changes"),
    [(1e-4, "zero", {}), (0.01, "corrupted", {"n_heads": 4, "n_key_value_heads": 2}), (0.1, "zero", {})],
)
def test_many_trials_at_once_are_one_after_the_other(threshold, ablation, changes):
    model = tiny_model(n_layers=1, dtype=torch.float64, **changes)
    metric = hl.kl(model, CLEAN)
    kept, n = one_after_the_other(model, metric, threshold, ablation)
    found = acdc(model, CLEAN, CORRUPTED, metric, threshold=threshold, value=ablation)
    assert found.kept == [found.circuit.graph.name(e) for e in reversed(range(n)) if kept[e]]
    run = run_edges(model, kept, CLEAN, CORRUPTED, metric, value=ablation)
    assert found.metric_of_circuit == pytest.approx(float(run.per_pair.mean()), abs=1e-12)
    tidy = found.circuit.graph.on_a_path(kept[None], rooted=ablation == "corrupted")[0]
    assert torch.equal(found.circuit.kept, tidy) and found.circuit.dropped == int(kept.sum() - tidy.sum())


@pytest.mark.parametrize(("name", "threshold"), ACDC)
def test_the_edges_that_auto_circuit_s_acdc_keeps(name, threshold):
    model = transformer_lens_model(name)
    found = acdc(model, CLEAN, CORRUPTED, hl.kl(model, CLEAN), threshold=threshold)
    assert sorted(found.circuit.graph.numbers(found.kept)) == ACDC[name, threshold]


def test_on_two_layers_each_kept_edge_was_worth_the_threshold_when_tried():
    model = tiny_model(dtype=torch.float64)
    found = acdc(model, CLEAN, CORRUPTED, diff, threshold=0.02)
    tried = ~found.drop.isnan()
    assert bool((found.drop[~found.removed] >= 0.02).all()) and bool((found.drop[found.removed & tried] < 0.02).all())
    assert found.n_runs >= int(tried.sum()) and 0 < found.circuit.n_edges < found.circuit.graph.n_edges
    assert len(found.table(3)) <= 3 and found.top(1).rows[0][1] == float(found.drop[~found.removed].max())


KINDS = [{}, {"block": "parallel"}, {"block": "sandwich"}, {"n_key_value_heads": 2, "attn_only": True}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "ablation"), [(KINDS[0], "mean"), (KINDS[1], "corrupted"), (KINDS[2], "zero"), (KINDS[3], "zero")]
)
def test_the_circuit_handed_over_has_the_metric_that_was_reported(changes, ablation):
    """In a sandwich block an edge into a head matters by the norm that all heads of the layer share."""
    model = tiny_model(n_heads=4, dtype=torch.float64, **changes)
    pairs = demo_pairs(model, 2)

    def value(circuit) -> float:
        return float(circuit.run(model, pairs).per_pair.mean())

    found = acdc(model, pairs, threshold=0.003, value=ablation)
    assert 0 < found.circuit.n_edges < found.circuit.graph.n_edges
    assert found.metric_of_circuit == pytest.approx(value(found.circuit), abs=1e-12)
    start = whole_circuit(model, value=ablation)
    for pruned in (
        prune_edges(model, start, pairs, size=30, share=0.3),
        prune_edges_below(model, start, pairs, threshold=0.003),
    ):
        kept = run_edges(model, pruned.circuit.kept, pairs, value=ablation)
        assert float(pruned.metric[-1]) == pytest.approx(float(kept.per_pair.mean()), abs=1e-12)


@pytest.mark.parametrize("changes", KINDS)
def test_a_circuit_cut_from_scores_loses_no_edge_that_acts(changes):
    model = tiny_model(n_heads=4, dtype=torch.float64, **changes)
    pairs = demo_pairs(model, 2)
    scores = eap(model, pairs)
    for threshold in scores.scores.abs().quantile(torch.tensor([0.6, 0.8, 0.9], dtype=torch.float64)).tolist():
        chosen = scores.scores.abs() >= threshold
        circuit = scores.above(threshold)
        runs = run_edges(model, torch.stack([chosen, circuit.kept]), pairs)
        torch.testing.assert_close(runs.per_pair[0], runs.per_pair[1], atol=1e-12, rtol=0)


def test_pruning_an_and_gate_and_an_or_gate():
    clean, corrupted = [[1, 1, 1]], [[1, 0, 1]]
    path = ["embed->L0H0.v", "L0H0->MLP0", "MLP0->logits"]
    start = whole_circuit(and_gate())
    assert prune_edges(and_gate(), start, clean, corrupted, logit, size=3).circuit.edges == path
    assert prune_edges_below(and_gate(), start, clean, corrupted, logit, threshold=0.5).circuit.edges == path
    kept = prune_nodes(and_gate(), start, clean, corrupted, logit, size=3).circuit
    assert set(path) <= set(kept.edges)
    # each head of an OR gate alone is worth nothing: a threshold cuts both, a greedy search only one
    gate, start = or_gate(), whole_circuit(or_gate(), value="zero")
    one = prune_edges(gate, start, [[0]], None, logit, size=2, share=0.01)
    assert one.circuit.n_edges == 2 and float(one.metric[-1]) == 1.0
    both = prune_edges_below(gate, start, [[0]], None, logit, threshold=0.5)
    assert both.circuit.edges == ["MLP0->logits"] and float(both.metric[-1]) == 0.0
    assert prune_nodes_below(gate, start, [[0]], None, logit, threshold=0.5).circuit.nodes == ["MLP0"]


def test_greedy_pruning_cuts_the_least_and_measures_again():
    model = tiny_model(n_layers=1, dtype=torch.float64)
    found = prune_edges(model, whole_circuit(model), CLEAN, CORRUPTED, diff, size=4, share=0.01)
    graph, kept = circuit_graph(model), torch.ones(13, dtype=torch.bool)
    while int(kept.sum()) > 4:
        each = kept & ~torch.eye(13, dtype=torch.bool)
        runs = run_edges(model, torch.cat([kept[None], each]), CLEAN, CORRUPTED, diff).per_pair.mean(1)
        worth = (runs[0] - runs[1:]).abs().masked_fill(~kept, torch.inf)
        kept = graph.on_a_path((kept & (torch.arange(13) != int(worth.argmin())))[None])[0]
    assert torch.equal(found.circuit.kept, kept)
    assert found.sizes.tolist() == sorted(found.sizes.tolist(), reverse=True) and found.sizes[0] == 13
    assert len(found.circuit.found_on) == 2


def test_thresholds_sizes_and_models_are_checked():
    model = tiny_model()
    start = whole_circuit(model)
    with pytest.raises(ValueError, match="above 0"):
        acdc(model, CLEAN, CORRUPTED, diff, threshold=0.0)
    with pytest.raises(ValueError, match="share"):
        prune_edges(model, start, CLEAN, CORRUPTED, diff, size=4, share=1.0)
    with pytest.raises(ValueError, match="at least 0"):
        prune_edges_below(model, start, CLEAN, CORRUPTED, diff, threshold=-1.0)
    with pytest.raises(ValueError, match="2 layers of 2 heads, MLPs"):
        prune_edges(tiny_model(n_layers=1), start, CLEAN, CORRUPTED, diff, size=4)
    assert circuit_of(model, ["embed->logits"]).n_edges == 1
