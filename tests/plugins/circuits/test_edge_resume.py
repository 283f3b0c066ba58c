"""Circuits stand on the engine of sweeps: bins by memory, checks by hooks, files to go on from."""

import functools

import pytest
import torch
from test_circuit_run import CLEAN, CORRUPTED, diff, some_masks

import hooklens as hl
from hooklens.core.errors import CheckFailed, FileRefused
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.plugins.circuits.run import Bench, run_edges
from hooklens.plugins.circuits.runner import EdgePatches, EdgeRunner
from hooklens.sweeps import execution as engine
from hooklens.testing import tiny_model

METRICS = {
    "plain function": lambda model: diff,
    "logit_diff": lambda model: hl.logit_diff(model, answer=3, wrong_answer=4),
}


@pytest.mark.parametrize("ablation", ["corrupted", "zero", "mean"])
@pytest.mark.parametrize("metric_of", METRICS.values(), ids=METRICS)
def test_an_interrupted_question_resumed_gives_the_bits_of_an_uninterrupted_one(
    tmp_path, monkeypatch, metric_of, ablation
):
    model = tiny_model()
    masks, right, bins, stops = some_masks(circuit_graph(model), 9), engine._run_bin, [], [2]

    def run_bin(patches, reader, items, *rest):
        if len(bins) in stops:
            stops.clear()
            raise KeyboardInterrupt
        bins.append([(item.patch, item.pair) for item in items])
        right(patches, reader, items, *rest)

    monkeypatch.setattr(engine, "_run_bin", run_bin)
    ask = functools.partial(run_edges, model, masks, CLEAN, CORRUPTED, metric_of(model), value=ablation)
    with hl.engine(memory=30_000, verify=0):
        with pytest.raises(KeyboardInterrupt):
            ask(resume=tmp_path / "circuits")
        resumed, whole = ask(resume=tmp_path / "circuits"), ask()
    n = len(bins) // 2
    assert n > 2 and bins[:n] == bins[n:]
    assert torch.equal(resumed.per_pair, whole.per_pair)


def test_other_circuits_prompts_ablation_or_metric_under_one_file_are_refused(tmp_path):
    model = tiny_model()
    masks, file = some_masks(circuit_graph(model)), tmp_path / "circuits"
    first = run_edges(model, masks, CLEAN, CORRUPTED, diff, resume=file)
    assert torch.equal(run_edges(model, masks, CLEAN, CORRUPTED, diff, resume=file).per_pair, first.per_pair)
    for changed in (
        (masks.flip(0), CLEAN, CORRUPTED, diff),
        (masks, CLEAN, CORRUPTED.roll(1, 0), diff),
        (masks, CLEAN, CORRUPTED, lambda logits: 2 * diff(logits)),
    ):
        with pytest.raises(FileRefused, match="another sweep"):
            run_edges(model, *changed, resume=file)
    with pytest.raises(FileRefused, match="another sweep"):
        run_edges(model, masks, CLEAN, CORRUPTED, diff, value="zero", resume=file)


def test_what_a_wrong_key_brings_back_is_checked_and_raises(tmp_path):
    model, named = tiny_model(), hl.Resume(tmp_path / "circuits", key="diff")
    masks, base = some_masks(circuit_graph(model)), diff(model(CLEAN)).detach()
    run_edges(model, masks, CLEAN, CORRUPTED, lambda x: diff(x) - base, resume=named)
    with pytest.raises(CheckFailed, match=r"circuit \d, kept in .*circuits.* another sweep"):
        run_edges(model, masks, CLEAN, CORRUPTED, lambda x: 10 * (diff(x) - base), resume=named)


def test_a_runner_that_is_wrong_shows(monkeypatch):
    model, right = tiny_model(), EdgeRunner.streams
    monkeypatch.setattr(EdgeRunner, "streams", lambda self, masks: right(self, masks) * torch.linspace(0.9, 1, 8))
    with pytest.raises(CheckFailed, match=r"circuit \d differs by .* from a plain hooked run"):
        run_edges(model, some_masks(circuit_graph(model)), CLEAN, CORRUPTED, diff)


def test_a_bench_is_checked_once_and_says_so():
    model = tiny_model(dtype=torch.float64)
    bench = Bench(model, hl.PromptPairs(CLEAN, CORRUPTED, diff), "corrupted", keep=True)
    masks = some_masks(bench.graph)
    first, second = bench.run(masks), bench.run(masks)
    assert (first.n_verified, second.n_verified) == (1, 0) and first.largest_error < 1e-12


@pytest.mark.parametrize("ablation", ["corrupted", "zero", "mean"])
def test_the_plain_loop_gives_the_same_numbers_for_mixed_edges(ablation):
    """Kept to a degree: what is between live and ablated is mixed in both ways."""
    model = tiny_model(n_heads=4, n_key_value_heads=2, positional_embedding_type="rotary", dtype=torch.float64)
    masks = torch.rand(4, circuit_graph(model).n_edges, generator=torch.Generator().manual_seed(1)).double()
    metric = hl.logit_diff(model, answer=[3, 1], wrong_answer=4, pos=2)
    fast = run_edges(model, masks, CLEAN, CORRUPTED, metric, value=ablation)
    with hl.engine(plain=True, memory=10_000):  # one pair at a time
        slow = run_edges(model, masks, CLEAN, CORRUPTED, metric, value=ablation)
    torch.testing.assert_close(fast.per_pair, slow.per_pair, atol=1e-11, rtol=1e-11)


def test_a_circuit_without_live_edges_runs_nothing_and_is_the_ablated_run(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(EdgePatches, "walk", None)
    found = run_edges(model, ~some_masks(circuit_graph(model))[-1:], CLEAN, CORRUPTED, diff)
    assert torch.equal(found.per_pair[0], found.empty_per_pair) and found.n_verified == 0
