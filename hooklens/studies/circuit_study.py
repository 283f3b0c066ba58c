"""Circuit discovery on your own prompt pairs: found on one half, tested on the other, compared with random circuits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hooklens.core.errors import ArgumentError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import check_prompts_differ, read_pairs
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.curve import FaithfulnessCurve, curve_of
from hooklens.plugins.circuits.edge_scores import EdgeScores
from hooklens.plugins.circuits.evaluation import CircuitEvaluation, evaluate_circuit
from hooklens.plugins.circuits.faithfulness import LEAST_DRAWS, Faithfulness, check_draws, measure_faithfulness
from hooklens.plugins.circuits.graph import CircuitGraph, circuit_graph
from hooklens.plugins.circuits.integrated_edges import eap_ig_midpoint
from hooklens.plugins.circuits.run import Bench
from hooklens.results.claims import Claim, ClaimFamily, Measured, Registration, claim, family
from hooklens.results.result import Result, Table
from hooklens.results.statistics import INTERVAL_TERMS, group_numbers
from hooklens.studies.pages import add_claims

_SHOWN = 20  # number of rows in a table of edges
_RANDOM = (
    "Faithfulness: the metric of the circuit alone, with all other edges corrupted, as a share of the model's; 0: no "
    "edge, 1: the model. Random circuits have as many edges of the same kinds."
)
_EDGE = {"edge": "from and to", "score": "its estimated effect on the logit difference"}
_MEASURED = {
    "what": "faithfulness with its interval over groups of pairs, and for random circuits; p is how often those are "
    "as close to 1; the metric is the logit difference",
    "value": "the number",
}
_CURVE = {
    "edges": "the number of edges in the circuit",
    "faithfulness": "as above",
    **INTERVAL_TERMS,
    "random: median": "median of random circuits of this size",
    "random: 95%": "the value that 95 % of them do not exceed",
    "pairs": "number of pairs it is measured on",
    "of these used to find it": "number of these that were used to find it",
}
_K = {
    "K": "how the set was drawn; greedy sets add the edge with the largest difference",
    "edges in K": "number of edges removed from both",
    "parts by (share)": "difference of the metrics of circuit and model, as a share of the model's; 0: complete",
}
_WORTH = {
    "edge": "from and to",
    "worth (share)": "the share of the model's metric that the circuit loses without the edge",
    **INTERVAL_TERMS,
    "q": "the false discovery rate, against edges of random circuits",
    "with all others": "the same with all other edges kept",
    "most without": "the removed set for which the edge has this value",
}
_SIZES = (0.125, 0.25, 0.5, 1.0, 2.0)  # sizes of the curve, as shares of the requested number of edges


@dataclass(frozen=True, eq=False)
class CircuitStudy(Result):
    """The circuit, and its faithfulness on pairs that were not used to find it.

    `held_out` is False if there was only one group of pairs: the test then uses the pairs of the search, and is weaker
    evidence. A full study has the `evaluation` (with completeness and minimality) and the `curve` over sizes, else
    None.
    """

    model: str
    circuit: Circuit
    faithfulness: Faithfulness
    n_found_on: int
    n_tested_on: int
    held_out: bool
    evaluation: CircuitEvaluation | None = None
    curve: FaithfulnessCurve | None = None

    def table(self, n: int | None = None) -> Table:
        """The faithfulness, that of random circuits, and the pairs it was measured on."""
        which = "not seen in the search" if self.held_out else "the same as in the search"
        tested = self.faithfulness if self.evaluation is None else self.evaluation
        rows = [*tested.table().rows, ("pairs of the search", self.n_found_on)]
        rows.append((f"pairs of the test, {which}", self.n_tested_on))
        if self.curve is not None:
            rows += [
                (f"area under the curve, up to {int(self.curve.sizes[-1])} edges", self.curve.area),
                ("area: random circuits, mean", float(self.curve.random_area.mean())),
                ("area: p", self.curve.p),
            ]
        return Table(("what", "value"), rows).head(n)

    def figure(self) -> Any:
        """The circuit, drawn upwards."""
        return self.circuit.figure()

    def claim(self, statement: str | None = None, *, registered: Registration | None = None) -> Claim:
        """The claim that these edges carry the answer: the metric they restore, compared with random circuits."""
        tested, metric = self.faithfulness, "logit_diff"
        group, whole, empty = tested.group, tested.base_per_pair, tested.empty_per_pair
        kept, random = tested.per_pair - empty, tested.random_per_pair - empty
        return claim(
            self.model,
            statement or statement_of(self.circuit.n_edges),
            observation=Measured.of("metric of the whole model", whole, group, metric=metric),
            intervention=Measured.of("the circuit's share of it, all else ablated", kept, group, metric=metric),
            control=Measured.edge_of("what random circuits keep", random, group, metric=metric),
            registered=registered,
            side="below" if bool((whole - empty).mean() < 0) else "above",
        )

    def claims(self, registered: Sequence[Registration] = ()) -> ClaimFamily:
        """The claim as a family of one, with the registration that states it."""
        return family(self.model, [self.claim()], registered=registered)

    def report(self, *, registered: Sequence[Registration] = ()) -> Any:
        """The study as a page; registrations made before the run are compared with its claims."""
        from hooklens.viz.report import Report

        report = Report(f"A circuit of {self.circuit.n_edges} edges in {self.model}")
        report.text(
            "Edges by integrated gradients between corrupted and clean prompts; all other edges carry the corrupted "
            "run. A faithful circuit is one way to answer these prompts, not the only one."
        )
        shared = "; L5G1 is a key/value head (G) of layer 5, whose keys and values the heads tied to it share"
        report.figure(
            self.figure(),
            "Blue edges raise the logit difference, orange ones lower it. L5H1 is head 1 of layer 5, MLP5 that layer's "
            "MLP, and L3H2->L5H1.q an edge from one head into the queries (.k keys, .v values) of "
            f"another{shared * (self.circuit.graph.group > 1)}.",
        )
        report.table(self.circuit.top(_SHOWN), "The edges with the largest scores.", _EDGE)
        report.heading("Against random circuits").figure(self.faithfulness.figure(), _RANDOM)
        report.table(self.table(), "", _MEASURED)
        add_claims(report, self.claims, registered)
        if self.curve is not None:
            report.heading("By size").figure(self.curve.figure()).table(self.curve.table(), "", _CURVE)
        if self.evaluation is not None:
            complete, minimal = self.evaluation.completeness, self.evaluation.minimality
            report.heading("Completeness").figure(complete.figure())
            report.table(complete.table(10), "The removed sets K of edges for which circuit and model differ most.", _K)
            report.heading("Minimality").figure(minimal.figure())
            report.table(minimal.table(_SHOWN), "", _WORTH)
        return report


def study_circuit(
    model: HookedTransformer,
    pairs: PromptPairs,
    *,
    edges: int = 200,
    full: bool = False,
    draws: int = LEAST_DRAWS,
    seed: int = 0,
) -> CircuitStudy:
    """Which edges carry the answer of these pairs? Found on one half of the groups, tested on the other.

    `full` adds completeness, minimality and the faithfulness of smaller and larger circuits, each compared with random
    ones: about forty times the work of the test.

    >>> from hooklens.testing import tiny_model
    >>> study = demo(tiny_model())
    >>> study.held_out, study.circuit.n_edges <= 12
    (True, True)
    """
    check_draws(draws)
    check_edges(edges, circuit_graph(model))
    pairs = as_pairs(model, pairs)
    pairs = replace(pairs, group=group_numbers(len(pairs), pairs.group))
    check_prompts_differ(read_pairs(model, pairs.clean, pairs.corrupted, ()))
    held_out = len(pairs.group.unique()) > 1
    found_on, tested_on = pairs.split(seed=seed) if held_out else (pairs, pairs)
    scores = eap_ig_midpoint(model, found_on)
    circuit = scores.top_edges(edges)
    evaluation = curve = None
    if full:
        evaluation = evaluate_circuit(model, circuit, tested_on, draws=draws, seed=seed)
        faithful = evaluation.faithfulness
        curve = curve_of(Bench(model, tested_on, circuit.replacement, keep=True), scores, _grown(scores, edges), draws)
    else:
        faithful = measure_faithfulness(model, circuit, tested_on, draws=draws, seed=seed)
    return CircuitStudy(
        model=model.cfg.model_name,
        circuit=circuit,
        faithfulness=faithful,
        n_found_on=len(found_on),
        n_tested_on=len(tested_on),
        held_out=held_out,
        evaluation=evaluation,
        curve=curve,
    )


def statement_of(n_edges: int) -> str:
    """What the claim of a circuit says."""
    return f"{n_edges} edges carry the answer"


def check_edges(edges: int, graph: CircuitGraph | None = None) -> None:
    """Raise if a circuit of this size cannot be searched for; without the graph, check only that it is a size."""
    if edges < 1 or (graph is not None and edges > graph.n_edges):
        most = "" if graph is None else f", at most the {graph.n_edges:,} edges of this model"
        raise ArgumentError("{edges} is the most edges of the circuit, at least 1{0}; got {1}", most, edges)


def _grown(scores: EdgeScores, edges: int) -> list[Circuit]:
    """Circuits around the requested size, cut in the same way as the study's."""
    sizes = {min(max(1, round(share * edges)), scores.graph.n_edges) for share in _SIZES}
    circuits = {circuit.n_edges: circuit for circuit in map(scores.top_edges, sorted(sizes))}
    return [circuits[n] for n in sorted(circuits) if n]


def demo(model: HookedTransformer) -> CircuitStudy:
    """Four short prompt pairs, a circuit of at most twelve edges; token numbers where the model has no tokenizer."""
    return study_circuit(model, demo_pairs(model, 4), edges=min(12, circuit_graph(model).n_edges))
