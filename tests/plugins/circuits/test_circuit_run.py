"""Exact edge patching: against a slow hooked run, in every family, and as auto-circuit computes it."""

from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES, tiny, tiny_tokens
from model.parity import transformer_lens_model
from model.zoo import TOKENS, ZOO, zoo_model
from recorded_circuits import RECORDED
from slow_edges import slow_logits
from torch import nn

import hooklens as hl
from hooklens.data.indirect_object import ioi
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.plugins.circuits.circuit import circuit_of, whole_circuit
from hooklens.plugins.circuits.edge_attribution import eap
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.plugins.circuits.run import Bench, run_edges
from hooklens.sweeps.replacement import OtherRun, Replacement, Resample
from hooklens.testing import and_gate, or_gate, tiny_model

CLEAN = torch.tensor([[1, 5, 2, 7, 3, 0], [4, 4, 9, 10, 8, 6]])
CORRUPTED = torch.tensor([[1, 5, 6, 7, 3, 0], [4, 2, 9, 10, 1, 6]])


def some_masks(graph, n: int = 3, seed: int = 0) -> torch.Tensor:
    """Random circuits from dense to sparse, then the empty and the whole one."""
    drawn = torch.rand(n, graph.n_edges, generator=torch.Generator().manual_seed(seed))
    dense = drawn < torch.linspace(0.9, 0.15, n)[:, None]
    return torch.cat([dense, torch.zeros(1, graph.n_edges).bool(), torch.ones(1, graph.n_edges).bool()])


def diff(logits):
    return logits[:, -1, 3] - logits[:, -1, 4]


def changed(tokens: torch.Tensor, places) -> torch.Tensor:
    out = tokens.clone()
    for row, column, value in places:
        out[row, column] = value
    return out


def agree(model, clean, corrupted, ablation: str, *, n_masks: int = 3, plain: bool = True) -> None:
    """Circuits by a built-in metric and (`plain`) by a plain function are those of one hooked pass each."""
    masks = some_masks(circuit_graph(model), n_masks)
    with torch.no_grad():
        slow = torch.stack([diff(slow_logits(model, kept, clean, corrupted, ablation)) for kept in masks])
        whole, other = diff(model(clean)), diff(model(corrupted))
    for metric in (hl.logit_diff(model, answer=3, wrong_answer=4), *([diff] if plain else [])):
        found = run_edges(model, masks, clean, corrupted, metric, value=ablation)
        torch.testing.assert_close(found.per_pair, slow, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(found.per_pair[-1], whole, atol=1e-9, rtol=0)
        torch.testing.assert_close(found.base_per_pair, whole, atol=1e-9, rtol=0)
        torch.testing.assert_close(found.per_pair[-2], found.empty_per_pair, atol=1e-9, rtol=0)
        if ablation == "corrupted":
            torch.testing.assert_close(found.empty_per_pair, other, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_exactly(name):
    clean = tiny_tokens(2, 9)
    corrupted = changed(clean, [(0, 4, 5), (1, 5, 9), (1, 6, 9)])
    agree(tiny(name, torch.float64), clean, corrupted, "corrupted", n_masks=1, plain=False)


@pytest.mark.parametrize("ablation", ["corrupted", "zero", "mean"])
@pytest.mark.parametrize("name", [n for n in ZOO if ZOO[n].get("block") != "post"])
def test_every_kind_of_model_runs_exactly(name, ablation):
    agree(zoo_model(name, dtype=torch.float64), TOKENS, changed(TOKENS, [(0, 2, 6), (1, 3, 3)]), ablation)


@pytest.mark.parametrize(("name", "ablation"), RECORDED)
def test_circuits_as_auto_circuit_computes_them(name, ablation):
    model = transformer_lens_model(name)
    n = torch.arange(1.0, circuit_graph(model).n_edges + 1)
    kept = torch.stack([torch.sin(1.7 * n + 3 * k) > 0.8 - 0.4 * k for k in range(5)])
    metric = hl.logit_diff(model, answer=3, wrong_answer=7)
    found = run_edges(model, kept, CLEAN, CORRUPTED, metric, value=ablation)
    expected = torch.tensor(RECORDED[name, ablation]["values"])
    torch.testing.assert_close(found.per_pair.mean(1), expected, atol=1e-4, rtol=1e-4)


def test_one_edge_cut_is_one_hook_on_the_clean_run():
    model = tiny_model(n_heads=4, n_key_value_heads=2, positional_embedding_type="rotary", dtype=torch.float64)
    graph = circuit_graph(model)
    _, clean = model.run_with_cache(CLEAN, ["result"])
    _, corrupted = model.run_with_cache(CORRUPTED, ["result"])
    move = (corrupted["result", 0] - clean["result", 0])[:, :, 3]

    def write(act, hook):
        act[:, :, 1] += move
        return act

    expected = diff(model.run_with_hooks(CLEAN, fwd_hooks=[("blocks.1.hook_k_input", write)]))
    kept = ~graph.mask(["L0H3->L1G1.k"])
    found = run_edges(model, kept, CLEAN, CORRUPTED, diff)
    torch.testing.assert_close(found.per_pair[0], expected.detach(), atol=1e-12, rtol=0)


def test_chunks_of_masks_and_pairs_change_nothing():
    model = tiny_model(dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(11, (7, 6), generator=generator)
    corrupted = changed(clean, [(i, 2 + i % 3, i) for i in range(7)])
    masks = some_masks(circuit_graph(model), 6)
    metric = hl.logit_diff(model, answer=list(range(7)), wrong_answer=8)
    whole = run_edges(model, masks, clean, corrupted, metric)
    for row in range(7):
        alone = run_edges(model, masks, clean[row], corrupted[row], metric.pairs(torch.tensor([row])))
        torch.testing.assert_close(whole.per_pair[:, row], alone.per_pair[:, 0], atol=1e-12, rtol=0)
    with hl.engine(memory=20_000):
        small = run_edges(model, masks, clean, corrupted, metric)
    torch.testing.assert_close(small.per_pair, whole.per_pair, atol=1e-12, rtol=0)


def test_prompts_of_several_lengths_keep_their_order():
    model = tiny_model(dtype=torch.float64)
    clean, corrupted = [[1, 2, 3], [1, 2, 3, 4], [5, 6, 7]], [[1, 9, 3], [1, 2, 8, 4], [5, 9, 7]]
    metric = hl.logit_diff(model, answer=[1, 2, 3], wrong_answer=[4, 5, 6])
    masks = some_masks(circuit_graph(model))
    found = run_edges(model, masks, clean, corrupted, metric)
    for row in range(3):
        alone = run_edges(model, masks, clean[row], corrupted[row], metric.pairs(torch.tensor([row])))
        torch.testing.assert_close(found.per_pair[:, row], alone.per_pair[:, 0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("metric_of", [hl.loss, hl.kl])
def test_metrics_that_read_other_positions_or_all_tokens(metric_of):
    model = tiny_model(dtype=torch.float64)
    metric = metric_of(model, CLEAN)
    found = run_edges(model, some_masks(circuit_graph(model)), CLEAN, CORRUPTED, metric)
    torch.testing.assert_close(found.per_pair[-1], metric(model(CLEAN)).detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.per_pair[-2], metric(model(CORRUPTED)).detach(), atol=1e-12, rtol=0)


def test_a_metric_that_gives_one_number_is_asked_pair_by_pair():
    model = tiny_model(dtype=torch.float64)
    masks = some_masks(circuit_graph(model))
    one = run_edges(model, masks, CLEAN, CORRUPTED, lambda logits: diff(logits).mean())
    torch.testing.assert_close(one.per_pair, run_edges(model, masks, CLEAN, CORRUPTED, diff).per_pair)


def test_a_bench_answers_again_as_it_did_before():
    model = tiny_model(dtype=torch.float64)
    bench = Bench(model, PromptPairs(CLEAN, CORRUPTED, diff), "corrupted", keep=True)
    masks = some_masks(bench.graph)
    first, second = bench.run(masks), bench.run(masks.flip(0))
    torch.testing.assert_close(first.per_pair, second.per_pair.flip(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(first.per_pair, run_edges(model, masks, CLEAN, CORRUPTED, diff).per_pair)


class LoRA(nn.Module):
    """A linear layer with something beside it, as adapters do."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner, self.weight = inner, inner.weight
        torch.manual_seed(0)
        self.more = nn.Parameter(0.3 * torch.randn(inner.out_features, inner.in_features, dtype=inner.weight.dtype))

    def forward(self, x):
        return self.inner(x) + x @ self.more.T


def test_wrapped_linear_layers_are_called_not_read():
    with torch.random.fork_rng(devices=[]):
        models = []
        for wrap in (LoRA, lambda linear: linear):
            model = tiny_model(dtype=torch.float64)
            for block in model.blocks:
                for name in "qkvo":
                    made = LoRA(getattr(block.attn, name))
                    if wrap is LoRA:
                        setattr(block.attn, name, made)
                    else:
                        with torch.no_grad():
                            made.inner.weight += made.more
            models.append(model)
    masks = some_masks(circuit_graph(models[0]))
    for ablation in ("corrupted", "zero"):
        a, b = (run_edges(m, masks, CLEAN, CORRUPTED, diff, value=ablation).per_pair for m in models)
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_gates():
    gate, logit = or_gate(), lambda logits: logits[:, -1, 1]
    graph = circuit_graph(gate)
    names = [["L0H0->MLP0", "MLP0->logits"], ["L0H1->MLP0", "MLP0->logits"], ["MLP0->logits"]]
    kept = torch.stack([graph.mask(edges) for edges in names])
    found = run_edges(gate, kept, [[0]], None, logit, value="zero")
    assert found.per_pair[:, 0].tolist() == [1.0, 1.0, 0.0] and found.faithfulness.tolist() == [1.0, 1.0, 0.0]
    gate = and_gate()
    circuit = circuit_of(gate, ["embed->L0H0.v", "L0H0->MLP0", "MLP0->logits"])
    run = circuit.run(gate, [[1, 1, 1]], [[1, 0, 1]], logit)
    assert run.faithfulness.tolist() == [pytest.approx(1.0)] and run.base_per_pair.tolist() == [pytest.approx(1.0)]
    assert circuit.without(["L0H0->MLP0"]).run(gate, [[1, 1, 1]], [[1, 0, 1]], logit).per_pair.item() == 0.0


def test_what_cannot_be_run_says_so():
    model = tiny_model()
    kept = whole_circuit(model).kept
    with pytest.raises(ValueError, match="46 edges"):
        run_edges(model, kept[:-1], CLEAN, CORRUPTED, diff)
    with pytest.raises(ValueError, match="needs corrupted prompts"):
        run_edges(model, kept, CLEAN, None, diff)
    with pytest.raises(KeyError, match="mean"):
        run_edges(model, kept, CLEAN, CORRUPTED, diff, value="means")
    with pytest.raises(ValueError, match="same length"):
        run_edges(model, kept, [[1, 2, 3]], [[1, 2]], diff)
    with pytest.raises(ValueError, match="there is one prompt"):
        run_edges(model, kept, CLEAN[:1], CORRUPTED[:1], diff, value="mean")
    with pytest.raises(ValueError, match="plain function"):
        run_edges(model, kept, [[1, 2], [1, 2, 3]], [[1, 3], [1, 3, 3]], diff)
    for bad in ("nan", "inf"):
        with pytest.raises(ValueError, match="not finite"):
            run_edges(model, kept, CLEAN, CORRUPTED, lambda logits, bad=float(bad): diff(logits) * bad)
    with model.hooks(fwd_hooks=[("z", lambda z, hook: z)]), pytest.raises(ValueError, match="other hooks"):
        run_edges(model, kept, CLEAN, CORRUPTED, diff)
    with pytest.raises(ValueError, match="post-norm"):
        run_edges(tiny_model(block="post"), kept, CLEAN, CORRUPTED, diff)


@pytest.mark.parametrize("value", [hl.Mean(reference=[[1, 2, 99]]), OtherRun([[1, 2, 99], [3, -1, 5]])])
def test_a_token_id_that_the_model_lacks_in_a_replacement_raises_as_it_does_in_prompts(value):
    model, (clean, corrupted) = tiny_model(), ([[1, 2, 3], [4, 5, 6]], [[1, 7, 3], [4, 8, 6]])
    whole = whole_circuit(model).kept
    for ask in (
        lambda: run_edges(model, whole, [[1, 2, 99]], [[1, 2, 3]], diff),
        lambda: run_edges(model, whole, clean, corrupted, diff, value=value),
        lambda: eap(model, clean, corrupted, diff, value=value),
    ):
        with pytest.raises(hl.HooklensError, match=r"token ids lie between 0 and 10 here, got .*99"):
            ask()
    with pytest.raises(hl.HooklensError, match="33 tokens do not fit this model's n_ctx of 32"):
        run_edges(model, whole, clean, corrupted, diff, value=hl.Mean(reference=[[1] * 33]))


def test_several_draws_of_resampling_are_refused_with_what_works():
    model, clean = tiny_model(), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    with pytest.raises(ValueError, match=r"draws 2; give one draw, such as Resample\(draws=1\)"):
        run_edges(model, whole_circuit(model).kept, clean, None, diff, value="resample")
    once = run_edges(model, whole_circuit(model).kept, clean, None, diff, value=Resample(draws=1))
    torch.testing.assert_close(once.per_pair[0], diff(model(clean)).detach(), atol=1e-5, rtol=0)


@dataclass(frozen=True, eq=False)
class Counted(Replacement):
    """Half of every node's own output, and a list of how often it was asked for."""

    asked: list

    def write(self, target):
        self.asked.append(len(target.tokens))
        return lambda act, point: act / 2


def test_the_values_of_cut_edges_are_computed_once_also_for_the_check():
    model, asked = tiny_model(dtype=torch.float64), []
    metric = hl.logit_diff(model, answer=3, wrong_answer=4)
    with hl.engine(memory=20_000):  # one pair in a batch
        found = run_edges(model, some_masks(circuit_graph(model)), CLEAN, None, metric, value=Counted(asked))
    assert found.n_verified == 2 and asked == [2]


@pytest.mark.slow
def test_on_a_real_model_all_edges_are_the_model_and_none_is_the_corrupted_run():
    model = hl.load("smollm2-135m-instruct")
    pairs = ioi(model, 4)
    metric, (clean, corrupted) = pairs.metric_of(model), pairs.tokens(model)
    graph = circuit_graph(model)
    kept = torch.stack([torch.ones(graph.n_edges), torch.zeros(graph.n_edges)]).bool()
    found = run_edges(model, kept, pairs)
    assert graph.n_edges == 70_651
    torch.testing.assert_close(found.per_pair[0], metric(model(clean)).detach(), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.per_pair[1], metric(model(corrupted)).detach(), atol=1e-3, rtol=1e-4)
