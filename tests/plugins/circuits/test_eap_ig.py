"""Integrated gradients over edges: the authors' code, OR gates, linear models, hooks edge by edge, what must add up.

No numbers of auto-circuit: its integrated gradients move the masks of all edges at once, which is another method.
"""

import pytest
import torch
from model.zoo import TOKENS, zoo_model
from recorded_eap_ig import CLEAN as THEIR_CLEAN
from recorded_eap_ig import CORRUPTED as THEIR_CORRUPTED
from recorded_eap_ig import SCORES, WEIGHTS
from test_circuit_run import CLEAN, CORRUPTED, changed, diff
from test_eap import slow_scores

import hooklens as hl
from hooklens.model.config import Biases
from hooklens.plugins.circuits.edge_attribution import eap
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.plugins.circuits.integrated_edges import eap_ig, eap_ig_activations, eap_ig_midpoint, eap_ig_own_source
from hooklens.plugins.circuits.run import run_edges
from hooklens.testing import _blank, or_gate, tiny_model


def logit(logits):
    return logits[:, -1, 1]


@pytest.fixture(scope="module")
def their_model():
    cfg = hl.HookedTransformerConfig(
        n_layers=2, d_model=8, n_ctx=32, n_heads=2, d_head=4, d_vocab=11, d_mlp=32, act_fn="gelu_new",
        normalization_type="LN",
    )  # fmt: skip
    model = hl.HookedTransformer(cfg).double()
    model.load_state_dict(
        {name: torch.tensor(numbers, dtype=torch.float64).view(shape) for name, (shape, numbers) in WEIGHTS.items()},
        strict=False,  # a b_U of zeros is ours alone
    )
    return model


@pytest.mark.parametrize(("method", "steps"), SCORES)
def test_scores_are_those_of_the_authors_code(their_model, method, steps):
    """Over activations every edge is scored in every group's runs: scoring the group's own edges alone is another."""
    ours = {
        "eap": lambda *asked: eap(*asked),
        "inputs": lambda *asked: eap_ig(*asked, steps=steps),
        "activations": lambda *asked: eap_ig_activations(*asked, steps=steps),
    }[method]
    found = ours(their_model, THEIR_CLEAN, THEIR_CORRUPTED, lambda logits: logits[:, -1, 5] - logits[:, -1, 6])
    theirs = -torch.tensor(SCORES[method, steps], dtype=torch.float64)
    torch.testing.assert_close(found.scores, theirs, atol=1e-6, rtol=0)


def test_own_source_and_midpoint_scores_are_not_the_authors(their_model):
    metric = lambda logits: logits[:, -1, 5] - logits[:, -1, 6]  # noqa: E731
    asked = their_model, THEIR_CLEAN, THEIR_CORRUPTED, metric
    own, theirs = eap_ig_own_source(*asked, steps=20).scores, -torch.tensor(SCORES["activations", 20])
    tops = [set(scores.abs().argsort(descending=True)[:10].tolist()) for scores in (own, theirs)]
    assert len(tops[0] & tops[1]) == 7 and "own source" in eap_ig_own_source(*asked, steps=2).method
    middle, theirs = eap_ig_midpoint(*asked, steps=20).scores, -torch.tensor(SCORES["inputs", 20]).double()
    assert 0.01 < float((middle - theirs).abs().max()) < 0.1 and "midpoints" in eap_ig_midpoint(*asked, steps=2).method


@pytest.mark.parametrize(("steps", "open_steps"), [(3, 1), (5, 2), (9, 4)])
def test_over_activations_a_head_of_an_or_gate_gets_the_steps_at_which_the_gate_is_open(steps, open_steps):
    """Both heads at k/steps: the gate's gradient is 1 below one half, else 0; in the two other groups' runs it is 0.

    1 - relu(1 - 2 k/steps), and in the runs of the MLP its input has no gradient, in those of the embedding the gate is
    closed. The mean is over three groups.
    """
    found = eap_ig_activations(or_gate(), [[0]], None, logit, value="zero", steps=steps)
    heads = found.scores[found.graph.numbers(["L0H0->MLP0", "L0H1->MLP0"])]
    assert heads.tolist() == pytest.approx([open_steps / steps / 3] * 2)


@pytest.mark.parametrize("steps", [2, 4, 10])
def test_each_head_of_an_or_gate_gets_half(steps):
    found = eap_ig_own_source(or_gate(), [[0]], None, logit, value="zero", steps=steps)
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
    # at 0, 1/9, ..., 8/9 of the way the gate is open up to 4/9: five of nine
    published = eap_ig(gate, [[1]], [[0]], logit, steps=9)
    assert published.scores[heads].tolist() == pytest.approx([5 / 9] * 2)
    for found in (eap_ig_midpoint(gate, [[1]], [[0]], logit), eap_ig_own_source(gate, [[1]], [[0]], logit)):
        assert found.base == 1.0 and found.empty == 0.0
        assert found.scores[heads].tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("method", "first"), [(eap_ig, 0.0), (eap_ig_midpoint, 0.5)])
@pytest.mark.parametrize("name", ["gpt2", "neox", "attn_only"])
def test_over_inputs_it_is_the_mean_of_hooked_gradients_between_the_two_embeddings(name, method, first):
    model, corrupted, steps = zoo_model(name, dtype=torch.float64), changed(TOKENS, [(0, 2, 6), (1, 3, 3)]), 3
    begin, end = (model.run_with_cache(tokens, ["hook_embed"])[1]["hook_embed"] for tokens in (corrupted, TOKENS))
    by_hand = [
        slow_scores(model, TOKENS, corrupted, [("hook_embed", lambda act, hook, at=at: begin + at * (end - begin))])
        for at in (torch.arange(steps).double() + first) / steps
    ]
    found = method(model, TOKENS, corrupted, diff, steps=steps)
    torch.testing.assert_close(found.scores, torch.stack(by_hand).mean(0), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_over_activations_it_is_the_mean_of_hooked_gradients_with_each_group_between_the_runs(name):
    model, corrupted, steps = zoo_model(name, dtype=torch.float64), changed(TOKENS, [(0, 2, 6), (1, 3, 3)]), 2
    points = ["blocks.0.hook_resid_pre"]
    points += [f"blocks.{i}.{what}" for i in range(model.cfg.n_layers) for what in ("hook_attn_out", "hook_mlp_out")]
    clean, other = (model.run_with_cache(tokens, points)[1] for tokens in (TOKENS, corrupted))
    by_hand = []
    for point in points:
        for share in (1 / 2, 1.0):
            between = (other[point] + share * (clean[point] - other[point])).detach()
            by_hand.append(slow_scores(model, TOKENS, corrupted, [(point, lambda act, hook, x=between: x)]))
    found = eap_ig_activations(model, TOKENS, corrupted, diff, steps=steps)
    torch.testing.assert_close(found.scores, torch.stack(by_hand).mean(0), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("method", [eap_ig, eap_ig_midpoint, eap_ig_own_source])
def test_on_a_linear_model_it_is_edge_attribution(method):
    model = tiny_model(normalization_type=None, act_fn="identity", dtype=torch.float64)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.zero_()
    plain = eap(model, CLEAN, CORRUPTED, diff)
    torch.testing.assert_close(method(model, CLEAN, CORRUPTED, diff, steps=3).scores, plain.scores)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((eap_ig_midpoint, name) for name in ("gpt2", "neox", "gemma3", "parallel_attn_only")),
        *((eap_ig_own_source, name) for name in ("neox", "attn_only")),
    ],
)
def test_what_leaves_the_embedding_adds_up_to_the_whole_difference(name, method):
    model, corrupted = zoo_model(name, dtype=torch.float64), changed(TOKENS, [(0, 2, 6), (1, 3, 3)])
    off = []
    for steps in (30, 60):
        found = method(model, TOKENS, corrupted, diff, steps=steps)
        off.append(abs(float(found.node_scores[0]) - (found.base - found.empty)))
    assert off[1] < 1e-3 * abs(found.base - found.empty)
    assert off[1] < 0.3 * off[0] or off[1] < 1e-9  # the midpoint rule: a quarter of the error at twice the steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ablation"), [("gpt2", "corrupted"), ("neox", "zero"), ("gemma3", "zero"), ("attn_only", "corrupted")]
)
def test_over_own_sources_the_last_group_adds_up_to_its_own_effect(name, ablation):
    """The last nodes before the logits: ablating their direct edges is all that ablating them does."""
    model, corrupted = zoo_model(name, dtype=torch.float64), changed(TOKENS, [(0, 2, 6), (1, 3, 3)])
    graph = circuit_graph(model)
    last = [graph.mlp_at(graph.n_layers - 1)] if graph.mlp else list(range(graph.n_sources)[graph.heads_at(1)])
    cut = ~graph.mask([f"{graph.source_names[i]}->logits" for i in last])
    runs = run_edges(model, cut, TOKENS, corrupted, diff, value=ablation)
    effect = float((runs.base_per_pair - runs.per_pair[0]).mean())
    found = eap_ig_own_source(model, TOKENS, corrupted, diff, value=ablation, steps=30)
    assert float(found.node_scores[last].sum()) == pytest.approx(effect, abs=1e-4 * max(1, abs(effect)))


def test_steps_and_missing_prompts_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="steps"):
        eap_ig(model, CLEAN, CORRUPTED, diff, steps=0)
    with pytest.raises(ValueError, match="eap_ig_activations"):
        eap_ig(model, CLEAN, None, diff)
