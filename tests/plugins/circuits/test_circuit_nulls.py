"""What p-values of circuits say where nothing is known, where nothing is special, and where something is."""

import re
from dataclasses import replace

import pytest
import torch
from test_circuit_run import CLEAN, CORRUPTED, diff

from hooklens.data.demo_prompts import demo_pairs
from hooklens.plugins.circuits.circuit import circuit_of
from hooklens.plugins.circuits.completeness import completeness_of
from hooklens.plugins.circuits.curve import FaithfulnessCurve, curve_of, trace_faithfulness
from hooklens.plugins.circuits.edge_attribution import demo_circuit, eap
from hooklens.plugins.circuits.evaluation import evaluate_circuit
from hooklens.plugins.circuits.faithfulness import Faithfulness, measure_faithfulness
from hooklens.plugins.circuits.minimality import Minimality, _most, minimality_of
from hooklens.plugins.circuits.random_draws import random_circuits
from hooklens.plugins.circuits.run import Bench
from hooklens.results.statistics import mean_interval, null_p
from hooklens.studies.circuit_study import study_circuit
from hooklens.testing import tiny_model

BOTH_WAYS = torch.tensor([1.0, -1.0])


def either_way(logits):
    """A metric whose gap has another sign in each pair: its mean is not distinguishable from 0."""
    return logits[:, -1, 3] * (BOTH_WAYS if len(logits) == 2 else 1)


@pytest.fixture(scope="module")
def found():
    model = tiny_model()
    pairs = demo_pairs(model, 4)
    return model, eap(model, pairs[:2]), demo_circuit(model, pairs[:2]), pairs[2:]


def test_a_value_that_is_not_known_is_reached_by_no_draw_and_significant_nowhere():
    null = torch.tensor([[1.0, 2.0, torch.nan], [3.0, 4.0, 5.0]])
    p = null_p(torch.tensor([torch.nan, 9.0, 9.0]), null)
    assert p[0].isnan() and p[1] == pytest.approx(1 / 3) and p[2].isnan()


def test_where_the_gap_may_be_0_no_part_of_an_evaluation_is_significant(found):
    model, scores, circuit, pairs = found
    seen = evaluate_circuit(model, circuit, pairs, metric=either_way)
    assert not seen.faithfulness.defined and seen.faithfulness.p != seen.faithfulness.p
    assert seen.completeness.p != seen.completeness.p
    assert bool(seen.minimality.p.isnan().all()) and bool(seen.minimality.q.isnan().all())
    assert seen.minimality.idle is None
    rows = dict(seen.table().rows)
    assert rows["edges worth more than a random circuit's (q < 0.05)"] is None
    assert rows["edges that may be worth nothing"] is None
    curve = trace_faithfulness(model, scores, pairs, metric=either_way, sizes=[5, 10])
    assert bool(curve.values.isnan().all()) and curve.p != curve.p


def test_with_one_pair_no_edge_is_called_needed(found):
    model, _, circuit, pairs = found
    seen = evaluate_circuit(model, circuit, pairs[:1])
    assert seen.minimality.idle is None and dict(seen.table().rows)["edges that may be worth nothing"] is None
    assert len(seen.minimality.table()) > 0


def test_fewer_than_100_random_circuits_are_refused(found):
    model, scores, circuit, pairs = found
    for ask in (
        lambda: measure_faithfulness(model, circuit, pairs, draws=99),
        lambda: evaluate_circuit(model, circuit, pairs, draws=3),
        lambda: trace_faithfulness(model, scores, pairs, sizes=[10], draws=3),
        lambda: study_circuit(model, pairs, edges=12, draws=5),
    ):
        with pytest.raises(ValueError, match="draws must be at least 100 random circuits"):
            ask()


def shares(p: list[float], *levels: float) -> list[float]:
    """Which share of p-values is at most each level."""
    values = torch.tensor(p)
    return [float((values <= level + 1e-6).float().mean()) for level in levels]


@pytest.fixture(scope="module")
def nothing_special():
    """A bench, scores, and circuits that are themselves random ones of one make."""
    model = tiny_model(n_heads=4)
    pairs = demo_pairs(model, 1)
    scores = eap(model, pairs)
    start = scores.greedy_edges(25)
    drawn = random_circuits(start.graph, start.kept, 80, seed=7)
    bench = Bench(model, pairs, "corrupted", keep=True)
    return bench, scores, [replace(start, kept=kept) for kept in drawn]


@pytest.mark.slow
def test_a_random_circuit_is_as_faithful_as_others_in_uniform_shares(nothing_special):
    bench, _, circuits = nothing_special
    p = [Faithfulness.of(bench, one, 19, seed=100 + i).p for i, one in enumerate(circuits)]
    few, half = shares(p, 0.1, 0.5)
    assert few < 0.22 and 0.33 < half < 0.67  # 0.1 and 0.5, give or take three standard errors


@pytest.mark.slow
def test_completeness_and_minimality_of_random_circuits_have_uniform_p_values(nothing_special):
    bench, _, circuits = nothing_special
    complete, minimal, least = [], [], []
    for i, one in enumerate(circuits):
        draw, faithful = torch.Generator().manual_seed(i), Faithfulness.of(bench, one, 19, seed=100 + i)
        null = random_circuits(one.graph, one.kept, 19, seed=100 + i)
        complete.append(completeness_of(bench, faithful, null, draw).p)
        found = minimality_of(bench, faithful, null, draw)
        minimal += found.p.tolist()
        least.append(float(found.q.min()))
    few, half = shares(complete, 0.1, 0.5)
    assert few < 0.22 and 0.33 < half < 0.67
    few, half = shares(minimal, 0.05, 0.5)  # 80 circuits of 25 edges, which are not independent
    assert 0.02 < few < 0.09 and 0.4 < half < 0.6
    assert shares(least, 0.1)[0] < 0.22


@pytest.mark.slow
def test_curves_of_scores_that_know_nothing_are_seldom_called_better_than_chance(nothing_special):
    """Circuits of one set of scores hold one another, so that their luck lasts over sizes."""
    bench, scores, _ = nothing_special
    graph = scores.graph
    ends = zip(*(x.tolist() for x in graph.ends), strict=True)
    kinds = [
        re.sub(r"H\d+", "H", f"{graph.source_names[source]}->{graph.receiver_names[receiver]}")
        for source, receiver in ends
    ]
    alike = [torch.tensor([i for i, one in enumerate(kinds) if one == kind]) for kind in dict.fromkeys(kinds)]
    draw, p = torch.Generator().manual_seed(0), []
    for _ in range(80):
        shuffled = scores.scores.clone()
        for edges in alike:
            shuffled[edges] = shuffled[edges[torch.randperm(len(edges), generator=draw)]]
        blind = replace(scores, scores=shuffled)
        circuits = {one.n_edges: one for one in map(blind.greedy_edges, (10, 15, 20, 25, 30, 40)) if one.n_edges}
        p.append(curve_of(bench, blind, [circuits[n] for n in sorted(circuits)], 19).p)
    assert shares(p, 0.05)[0] < 0.12 and shares(p, 0.1)[0] < 0.2


def test_the_search_for_the_best_set_lends_an_edge_that_is_worth_nothing_no_luck():
    """Worth without each of 11 sets is noise: the largest of them is not 0, what the other half chose is."""
    noise = torch.randn(400, 11, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own, best = _most(noise, torch.arange(24) // 2)
    low, high = mean_interval(own.T, group=torch.arange(24) // 2)
    covered = float(((low <= 0) & (high >= 0)).double().mean())
    largest = noise[torch.arange(400), best]
    low, high = mean_interval(largest.T, group=torch.arange(24) // 2)
    naive = float(((low <= 0) & (high >= 0)).double().mean())
    assert covered > 0.91 and naive < 0.7, (covered, naive)


def minimality(effect: list[float], null: torch.Tensor) -> Minimality:
    values = torch.tensor(effect)
    nan = torch.full_like(values, torch.nan)
    names, given = [str(i) for i in range(len(effect))], ["nothing"] * len(effect)
    return Minimality(names, values, nan, nan, values, given, null, "corrupted")


def test_a_few_strong_edges_of_a_large_circuit_can_be_called_worth_more():
    null = 0.01 * torch.rand(100, 10, generator=torch.Generator().manual_seed(0))
    strong = minimality([0.5] * 20 + [0.001] * 180, null)
    assert bool((strong.q[:20] < 0.05).all()) and bool((strong.q[20:] > 0.05).all())
    # one edge of 200 beats the 10 that were tried of each of 100 circuits in one case of six: 200 / 1,200
    alone = minimality([0.5] + [0.001] * 199, null)
    assert float(alone.q[0]) == pytest.approx(alone.least_q) == pytest.approx(200 / 10 / 101)


def test_the_best_edge_of_a_large_random_circuit_is_seldom_called_worth_more():
    """All edges and the few of each random circuit are alike: q was 1 / 101 whenever the best of all was its own."""
    draw = torch.Generator().manual_seed(0)
    called = 0
    for _ in range(100):
        null = torch.rand(100, 5, generator=draw)
        called += bool((minimality(torch.rand(200, generator=draw).tolist(), null).q <= 0.05).any())
    assert called <= 10


def test_edges_of_one_random_circuit_that_are_alike_count_once():
    """Ten draws' edges beat the value: a tenth of draws, however many edges each of them gave."""
    null = torch.zeros(100, 10)
    null[:10] = 1.0
    assert float(minimality([0.5], null).p[0]) == pytest.approx(11 / 101)
    assert float(minimality([0.5], null[:, :1]).p[0]) == pytest.approx(11 / 101)
    # the circuit as one more draw, whose edges rank among those of all others
    own = minimality([0.5, 0.4, 0.3, 0.2], torch.zeros(100, 10))
    assert own.p.tolist() == pytest.approx([1 / 404, 2 / 404, 3 / 404, 4 / 404])
    # where two edges of each were tried, the best of four is not worth more than one of two
    assert minimality([0.5, 0.4, 0.3, 0.2], torch.zeros(100, 2)).p.tolist() == pytest.approx(
        [2 / 404, 2 / 404, 3 / 404, 4 / 404]
    )


def test_a_curve_says_on_how_many_of_its_prompts_the_edges_were_found(found):
    model, scores, _, pairs = found
    half = trace_faithfulness(model, scores, demo_pairs(model, 4)[1:], sizes=[20])
    assert (half.n_seen, half.n_pairs) == (1, 3)
    row = dict(zip(half.table().columns, half.table().rows[0], strict=True))
    assert (row["pairs"], row["of these used to find it"]) == (3, 1)
    assert "1 of 3 pairs used to find it" in half.figure().layout.title.text
    held_out = trace_faithfulness(model, scores, pairs, sizes=[20])
    assert "used to find" not in held_out.figure().layout.title.text


def test_a_curve_is_compared_in_its_own_precision():
    values = torch.tensor([0.1, 0.63], dtype=torch.float64)
    size, nan = torch.tensor([3, 7]), torch.full((2,), torch.nan, dtype=torch.float64)
    curve = FaithfulnessCurve(size, values, nan, nan, values.repeat(100, 1), 10, "by hand", "zero", 2, 0)
    assert curve.p == 1.0  # every random circuit is the circuit itself


@pytest.mark.slow
def test_a_circuit_of_one_edge_has_nothing_left_without_it():
    model = tiny_model()
    seen = evaluate_circuit(model, circuit_of(model, ["embed->logits"]), CLEAN, CORRUPTED, diff)
    assert seen.minimality.null.shape == (100, 1) and seen.minimality.effect.shape == (1,)
