"""Integrated gradients over edges: OR gates, linear models, hooks edge by edge, what the scores must add up to.

No numbers of auto-circuit: its integrated gradients move the masks of all edges at once, which is another method.
"""

import pytest
import torch
from model.zoo import TOKENS, zoo_model
from test_circuit_run import CLEAN, CORRUPTED, changed, diff
from test_eap import slow_scores

from hooklens.model.config import Biases
from hooklens.plugins.circuits.eap import eap
from hooklens.plugins.circuits.eap_ig import eap_ig, eap_ig_activations
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.plugins.circuits.run import run_edges
from hooklens.testing import _blank, or_gate, tiny_model


def logit(logits):
    return logits[:, -1, 1]


@pytest.mark.parametrize("steps", [2, 4, 10])
def test_each_head_of_an_or_gate_gets_half(steps):
    found = eap_ig_activations(or_gate(), [[0]], None, logit, ablation="zero", steps=steps)
    heads = found.scores[found.graph.numbers(["L0H0->MLP0", "L0H1->MLP0"])]
    assert heads.tolist() == pytest.approx([0.5, 0.5])


def test_over_inputs_each_head_gets_half_too():
    # three dimensions: what the embedding says, what the heads say, what the gate says
    gate = _blank("or of the token", d_model=3, n_heads=2, d_head=1, d_mlp=1, biases=Biases(o=False)).double()
    block = gate.blocks[0]
    with torch.no_grad():
        gate.W_E[1, 0] = 1.0
        block.attn.W_V[:, 0, 0] = 1.0
        block.attn.W_O[:, 0, 1] = 1.0
        block.mlp.W_in[1, 0], block.mlp.b_in[0] = -1.0, 1.0
        block.mlp.W_out[0, 2], block.mlp.b_out[2] = -1.0, 1.0
        gate.W_U[2, 1] = 1.0
    graph = circuit_graph(gate)
    heads = graph.numbers(["L0H0->MLP0", "L0H1->MLP0"])
    assert eap(gate, [[1]], [[0]], logit).scores[heads].tolist() == [0.0, 0.0]
    for found in (eap_ig(gate, [[1]], [[0]], logit), eap_ig_activations(gate, [[1]], [[0]], logit)):
        assert found.clean == 1.0 and found.ablated == 0.0
        assert found.scores[heads].tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("name", ["gpt2", "neox", "attn_only"])
def test_over_inputs_it_is_the_mean_of_hooked_gradients_between_the_two_embeddings(name):
    model, corrupted, steps = zoo_model(name, dtype=torch.float64), changed(TOKENS, [(0, 2, 6), (1, 3, 3)]), 3
    begin, end = (model.run_with_cache(tokens, ["hook_embed"])[1]["hook_embed"] for tokens in (corrupted, TOKENS))
    by_hand = [
        slow_scores(model, TOKENS, corrupted, [("hook_embed", lambda act, hook, at=at: begin + at * (end - begin))])
        for at in (torch.arange(steps).double() + 0.5) / steps
    ]
    found = eap_ig(model, TOKENS, corrupted, diff, steps=steps)
    torch.testing.assert_close(found.scores, torch.stack(by_hand).mean(0), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("method", [eap_ig, eap_ig_activations])
def test_on_a_linear_model_it_is_edge_attribution(method):
    model = tiny_model(normalization_type=None, act_fn="identity", dtype=torch.float64)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.zero_()
    plain = eap(model, CLEAN, CORRUPTED, diff)
    torch.testing.assert_close(method(model, CLEAN, CORRUPTED, diff, steps=3).scores, plain.scores)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((eap_ig, name) for name in ("gpt2", "llama", "neox", "attn_only", "gemma3", "parallel_attn_only")),
        *((eap_ig_activations, name) for name in ("neox", "attn_only")),
    ],
)
def test_what_leaves_the_embedding_adds_up_to_the_whole_difference(name, method):
    model, corrupted = zoo_model(name, dtype=torch.float64), changed(TOKENS, [(0, 2, 6), (1, 3, 3)])
    off = []
    for steps in (40, 80):
        found = method(model, TOKENS, corrupted, diff, steps=steps)
        off.append(abs(float(found.node_scores[0]) - (found.clean - found.ablated)))
    assert off[1] < 1e-3 * abs(found.clean - found.ablated)
    assert off[1] < 0.3 * off[0] or off[1] < 1e-9  # the midpoint rule: a quarter of the error at twice the steps


@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma3", "attn_only"])
@pytest.mark.parametrize("ablation", ["corrupted", "zero"])
def test_over_activations_the_last_group_adds_up_to_its_own_effect(name, ablation):
    """The last nodes before the logits: ablating their direct edges is all that ablating them does."""
    model, corrupted = zoo_model(name, dtype=torch.float64), changed(TOKENS, [(0, 2, 6), (1, 3, 3)])
    graph = circuit_graph(model)
    last = [graph.mlp_at(graph.n_layers - 1)] if graph.mlp else list(range(graph.n_sources)[graph.heads_at(1)])
    cut = ~graph.mask([f"{graph.source_names[i]}->logits" for i in last])
    runs = run_edges(model, cut, TOKENS, corrupted, diff, ablation=ablation)
    effect = float((runs.model_per_pair - runs.per_pair[0]).mean())
    found = eap_ig_activations(model, TOKENS, corrupted, diff, ablation=ablation, steps=60)
    assert float(found.node_scores[last].sum()) == pytest.approx(effect, abs=1e-4 * max(1, abs(effect)))


def test_steps_and_missing_prompts_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="steps"):
        eap_ig(model, CLEAN, CORRUPTED, diff, steps=0)
    with pytest.raises(ValueError, match="eap_ig_activations"):
        eap_ig(model, CLEAN, None, diff)
