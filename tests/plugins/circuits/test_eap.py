"""Edge attribution: derivatives of exact runs, hooks edge by edge, linear models, gates, auto-circuit's numbers."""

import pytest
import torch
from families import FAMILIES, tiny, tiny_tokens
from model.parity import transformer_lens_model
from model.zoo import TOKENS, ZOO, zoo_model
from recorded_circuits import RECORDED
from slow_edges import node_outputs
from test_circuit_run import CLEAN, CORRUPTED, LoRA, changed, diff

import hooklens as hl
from hooklens.plugins.circuits.edge_attribution import eap
from hooklens.plugins.circuits.edge_scores import _grown
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.plugins.circuits.run import Bench, run_edges
from hooklens.plugins.patching import attribution_patch
from hooklens.testing import and_gate, or_gate, tiny_model


def derivatives(model, clean, corrupted, ablation: str, step: float = 1e-4) -> torch.Tensor:
    """How the metric moves as each edge goes from its live value towards the ablated one, by exact runs."""
    n = circuit_graph(model).n_edges
    whole, eye = torch.ones(n, n, dtype=torch.float64), step * torch.eye(n, dtype=torch.float64)
    bench = Bench(model, hl.PromptPairs(clean, corrupted, diff), ablation)
    values = bench.run(torch.cat([whole + eye, whole - eye]))  # run_edges takes no number above 1
    more, less = values.per_pair.mean(1).chunk(2)
    return (more - less) / (2 * step)


@pytest.mark.parametrize("ablation", ["corrupted", "zero", "mean"])
@pytest.mark.parametrize("name", [n for n in ZOO if ZOO[n].get("block") != "post"])
def test_a_score_is_the_derivative_of_the_exact_run(name, ablation):
    model, corrupted = zoo_model(name, dtype=torch.float64), changed(TOKENS, [(0, 2, 6), (1, 3, 3)])
    exact = derivatives(model, TOKENS, corrupted, ablation)
    found = eap(model, TOKENS, corrupted, hl.logit_diff(model, answer=3, wrong_answer=4), value=ablation)
    # the central difference is off by the third derivative times step^2
    torch.testing.assert_close(found.scores, exact, atol=1e-6 * float(exact.abs().max().clamp_min(1)), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_in_every_family(name):
    clean = tiny_tokens(2, 9)
    model, corrupted = tiny(name, torch.float64), changed(clean, [(0, 4, 5), (1, 5, 9), (1, 6, 9)])
    exact = derivatives(model, clean, corrupted, "corrupted", 1e-5)
    found = eap(model, clean, corrupted, diff)
    torch.testing.assert_close(found.scores, exact, atol=1e-6 * float(exact.abs().max().clamp_min(1)), rtol=1e-5)


def slow_scores(model, clean, corrupted, hooks=()) -> torch.Tensor:
    """Every edge by itself: the gradient at a hooked input (in a run with `hooks`), times what the edge carries."""
    graph = circuit_graph(model)
    a, b = (node_outputs(model, graph, tokens)[0] for tokens in (clean, corrupted))
    final, found = f"blocks.{graph.n_layers - 1}.hook_resid_post", []
    for slot in graph.slots:
        wanted = {
            "attn": [f"blocks.{slot.layer}.hook_{x}_input" for x in "qkv"],
            "mlp": [f"blocks.{slot.layer}.hook_mlp_in"],
            "logits": [final],
        }[slot.kind]  # each replaced by a leaf in a run of its own, so that its gradient is that of its own path
        for name in wanted:
            leaves = []

            def leaf(act, hook, leaves=leaves):
                leaves.append(act.detach().requires_grad_())
                return leaves[0]

            value = diff(model.run_with_hooks(clean, fwd_hooks=[*hooks, (name, leaf)])).sum()
            (grad,) = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)  # 0 where cut off
            grads = grad.unbind(2) if grad.ndim == 4 else [grad]
            for g in grads:
                for source in range(slot.columns):
                    found.append(((a[source] - b[source]) * g).sum() / len(clean))
    return torch.stack(found).detach()


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "attn_only", "no_norm", "window"])
def test_a_score_is_what_a_hook_at_each_input_gives(name):
    model, corrupted = zoo_model(name, dtype=torch.float64), changed(TOKENS, [(0, 2, 6), (1, 3, 3)])
    found = eap(model, TOKENS, corrupted, diff)
    torch.testing.assert_close(found.scores, slow_scores(model, TOKENS, corrupted), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("name", "ablation"), RECORDED)
def test_scores_as_auto_circuit_computes_them(name, ablation):
    model = transformer_lens_model(name)
    metric = hl.logit_diff(model, answer=3, wrong_answer=7)
    found = eap(model, CLEAN, CORRUPTED, metric, value=ablation)
    expected = torch.tensor(RECORDED[name, ablation]["scores"])
    torch.testing.assert_close(found.scores, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attn_only", [True, False])
@pytest.mark.parametrize("ablation", ["corrupted", "zero"])
def test_in_a_linear_model_a_score_is_the_exact_effect(attn_only, ablation):
    model = tiny_model(normalization_type=None, act_fn="identity", attn_only=attn_only, dtype=torch.float64)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.zero_()  # every pattern is uniform, whatever is read
    graph = circuit_graph(model)
    whole = torch.ones(graph.n_edges, dtype=torch.bool)
    kept = torch.cat([whole[None], ~torch.eye(graph.n_edges, dtype=torch.bool)])
    values = run_edges(model, kept, CLEAN, CORRUPTED, diff, value=ablation).per_pair.mean(1)
    found = eap(model, CLEAN, CORRUPTED, diff, value=ablation)
    torch.testing.assert_close(found.scores, values[0] - values[1:], atol=1e-10, rtol=0)
    into_logits = graph.block(found.scores, graph.slots[-1])
    torch.testing.assert_close(into_logits.sum(), torch.tensor(found.base - found.empty).double())


def test_gates():
    logit = lambda logits: logits[:, -1, 1]  # noqa: E731
    found = eap(or_gate(), [[0]], None, logit, value="zero")
    assert found.base == 1.0 and found.empty == 0.0
    graph = found.graph
    heads = found.scores[graph.numbers(["L0H0->MLP0", "L0H1->MLP0"])]
    assert heads.tolist() == [0.0, 0.0]
    gate = and_gate()
    scores = eap(gate, [[1, 1, 1]], [[1, 0, 1]], logit)
    assert scores.top_edges(3).edges == ["embed->L0H0.v", "L0H0->MLP0", "MLP0->logits"]


def test_a_node_is_worth_its_edges():
    model = tiny_model(n_heads=4, n_key_value_heads=2, dtype=torch.float64)
    found = eap(model, CLEAN, CORRUPTED, diff)
    graph = found.graph
    _, clean = model.run_with_cache(CLEAN, ["attn_out", "mlp_out"], grads=True)
    by_hand = torch.autograd.grad(diff(model.read_out(clean_final(model, clean))).sum(), clean["mlp_out", 0])[0]
    _, other = model.run_with_cache(CORRUPTED, ["mlp_out"])
    expected = ((clean["mlp_out", 0] - other["mlp_out", 0]) * by_hand).sum() / 2
    torch.testing.assert_close(found.node_scores[graph.mlp_at(0)], expected.detach(), atol=1e-12, rtol=0)


def clean_final(model, cache) -> torch.Tensor:
    return model(cache["mlp_out", 0] + model(CLEAN, stop_at_layer=1).detach() - cache["mlp_out", 0].detach(), **_rest)


_rest = {"start_at_layer": 1, "stop_at_layer": 2}


def test_chunks_of_pairs_and_lengths_change_nothing():
    model = tiny_model(dtype=torch.float64)
    clean, corrupted = [[1, 2, 3], [1, 2, 3, 4], [5, 6, 7]], [[1, 9, 3], [1, 2, 8, 4], [5, 9, 7]]
    metric = hl.logit_diff(model, answer=[1, 2, 3], wrong_answer=[4, 5, 6])
    found = eap(model, clean, corrupted, metric)
    one = [eap(model, clean[i], corrupted[i], metric.pairs(torch.tensor([i]))).scores for i in range(3)]
    torch.testing.assert_close(found.scores, torch.stack(one).mean(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.std_error, torch.stack(one).std(0) / 3**0.5, atol=1e-12, rtol=0)
    with hl.engine(memory=1):
        torch.testing.assert_close(eap(model, clean, corrupted, metric).scores, found.scores, atol=1e-12, rtol=0)


def test_wrapped_linear_layers_are_called_not_read():
    models = []
    with torch.random.fork_rng(devices=[]):
        for merged in (False, True):
            model = tiny_model(dtype=torch.float64)
            for block in model.blocks:
                for name in "qkvo":
                    made = LoRA(getattr(block.attn, name))
                    if merged:
                        with torch.no_grad():
                            made.inner.weight += made.more
                    else:
                        setattr(block.attn, name, made)
            models.append(model)
    a, b = (eap(m, CLEAN, CORRUPTED, diff).scores for m in models)
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_circuits_cut_from_scores():
    found = eap(tiny_model(), CLEAN, CORRUPTED, diff)
    graph = found.graph
    for cut in (found.top_edges, found.greedy_edges):
        sizes = [cut(n).n_edges for n in range(1, graph.n_edges + 1)]
        assert all(size <= n for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
        assert sizes[-1] == graph.n_edges
        circuit = cut(20)
        assert torch.equal(graph.on_a_path(circuit.kept[None])[0], circuit.kept)
    whole = found.above(0.0)
    assert whole.n_edges == graph.n_edges and whole.dropped == 0
    assert found.above(1e9).n_edges == 0
    assert len(found.top_nodes(2).nodes) <= 4
    order = found.order()
    assert order == sorted(range(graph.n_edges), key=lambda e: (-abs(float(found.scores[e])), e))
    with pytest.raises(ValueError, match="46 edges"):
        found.top_edges(47)
    with pytest.raises(ValueError, match="nodes beside"):
        found.top_nodes(7)


def test_greedy_takes_the_largest_edge_into_what_is_in():
    found = eap(tiny_model(), CLEAN, CORRUPTED, diff)
    graph, opened, left = found.graph, {"logits"}, set(range(found.graph.n_edges))
    for edge in _grown(graph, found.scores):
        open_now = [e for e in left if graph.name(e).partition("->")[2].partition(".")[0] in opened]
        assert abs(found.scores[edge]) == max(abs(found.scores[e]) for e in open_now)
        left.remove(edge)
        opened.add(graph.name(edge).partition("->")[0])
    assert not left


@pytest.mark.parametrize(
    "metric", [lambda logits: logits[:, -1].argmax(-1).double(), lambda logits: diff(logits).mean().item()]
)
def test_a_metric_without_a_gradient_is_refused_also_one_that_returns_a_number(metric):
    with pytest.raises(ValueError, match="without a gradient"):
        eap(tiny_model(), CLEAN, CORRUPTED, metric)
    with pytest.raises(ValueError, match="no gradient"):
        attribution_patch(tiny_model(), CLEAN, CORRUPTED, metric)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_metric_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        eap(tiny_model(), CLEAN, CORRUPTED, lambda logits: logits[:, -1, 3] * float(bad))
