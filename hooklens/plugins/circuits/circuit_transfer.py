"""Does a circuit found in one model exist in another? Carried over by its nodes' roles, beside random counterparts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.plugins.circuits.carry import Carrier, random_maps, shuffled
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.circuit_metrics import LEAST_DRAWS, Faithfulness, check_draws, measured
from hooklens.plugins.circuits.edge_attribution import eap
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.plugins.circuits.integrated_edges import eap_ig_midpoint, eap_ig_own_source
from hooklens.plugins.circuits.matching import Matching, match, measure_matching
from hooklens.plugins.circuits.roles import comparable, roles_of
from hooklens.plugins.circuits.run import Bench
from hooklens.plugins.heads.taxonomy import Taxonomy, classify_heads
from hooklens.results.result import Result, Table
from hooklens.results.statistics import group_numbers, halves, quantiles
from hooklens.sweeps.replacement import Replacement, is_run

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_NULLS = ("random heads", "random in same layers")


@dataclass(frozen=True, eq=False)
class CircuitTransfer(Result):
    """A circuit at home, and what became of it in another model, all on pairs that chose neither roles nor matching.

    `mapped` is the circuit carried over by role; its random ones are carried to random heads, with as many edges, and
    those of `in_layers` to random heads of the layers that the match chose: what roles add beyond depth. `own` is a
    circuit of as many edges found in the target itself, `by_index` the same edges by name where both models have one
    shape (else None). `home` stands beside random circuits of the source.

    Shares of the target are NaN where ablating all of it does not move the metric: it does not do the task at all.
    `n_different` says how many of the random circuits are different ones. Where they are few, no p-value can be small.
    """

    terms = {
        "p against random": "how often random circuits of as many edges are as faithful",
    }

    source: str
    target: str
    matching: Matching
    home: Faithfulness
    mapped: Faithfulness
    in_layers: Faithfulness
    own: Faithfulness
    by_index: Faithfulness | None
    n_matched_on: int
    n_different: dict[str, int]

    @property
    def replacement(self) -> Replacement:
        """What edges outside a circuit, and nodes whose effect is measured, carried in either model."""
        return self.mapped.replacement

    @property
    def p(self) -> float:
        """How often a circuit on random heads is at least as faithful as the one on matched heads."""
        return self.mapped.p

    def table(self, n: int | None = None) -> Table:
        """Faithfulness with its 95 % interval; for random circuits the median and the middle 90 %."""
        lost = f", {len(self.matching.lost)} of {self.matching.n_edges} edges lost"
        shown = [
            (f"in {self.source}", self.home, self.home.p),
            (f"in {self.target}, by role{lost}", self.mapped, None),
            (f"in {self.target}, same edges by name", self.by_index, None),
            (f"{self.target}'s own ({self.own.circuit.method})", self.own, None),
        ]
        rows: list[tuple] = [
            (what, one.circuit.n_edges, one.value, *one.interval(), p) for what, one, p in shown if one is not None
        ]
        for what, one in zip(self.n_different, (self.mapped, self.in_layers), strict=True):
            low, middle, high = _quantiles(one.random)
            name = f"{what} ({len(one.random)} draws, {self.n_different[what]} different)"
            rows.append((name, one.circuit.n_edges, middle, low, high, one.p))
        return Table(("circuit", "edges", "faithfulness", "low", "high", "p against random"), rows).head(n)

    def figure(self) -> Any:
        """Faithfulness of each circuit beside random ones, whose whiskers span the middle 90 %."""
        from hooklens.viz.figures import bars

        shown = {self.source: self.home, f"{self.target}, own": self.own, f"{self.target}, by role": self.mapped}
        if self.by_index is not None:
            shown[f"{self.target}, by name"] = self.by_index
        rows = [(one.value, *one.interval()) for one in shown.values()]
        for one in (self.mapped, self.in_layers):
            low, middle, high = _quantiles(one.random)
            rows.append((middle, low, high))
        names = [*shown, *self.n_different]
        value, low, high = torch.tensor(rows, dtype=self.mapped.per_pair.dtype).nan_to_num().T
        known = all(x == x for row in rows for x in row)
        title = f"Does the circuit transfer? ({self.replacement} ablation, {len(self.mapped.per_pair)} held-out pairs)"
        marks = {"the model": 1.0, "no edge": 0.0}
        ends = (low, high) if known else (None, None)
        return bars(value, ends[0], ends[1], names, title, y_title="faithfulness", marks=marks)


def transfer_circuit(
    model: "HookedTransformer",
    circuit: Circuit,
    task: PromptPairs,
    target: "HookedTransformer",
    target_task: PromptPairs,
    *,
    taxonomies: tuple[Taxonomy, Taxonomy] | None = None,
    draws: int = LEAST_DRAWS,
    seed: int = 0,
) -> CircuitTransfer:
    """Does a circuit of `model` exist in `target`: another checkpoint, another seed, another architecture?

    Every node gets a role: a head its taxonomy label, and each node what the task loses without it, under the
    circuit's own ablation. Nodes of the circuit are matched to nodes of the target by role (`match`), its edges are
    carried over, and those that the target cannot have are lost. What arrives runs in the target beside `draws`
    circuits on random heads with as many edges, and beside one that the target itself shows (EAP-IG at midpoints, grown
    from the logits).

    Roles are measured on one half of the pairs, faithfulness on the other: `halves(len(task), group=task.group,
    seed=seed)`, so that a circuit found on the first of these is tested on pairs it has not seen. The tasks hold the
    same texts in the same order, each in its model's tokens. `taxonomies` are those of both models, worked out if not
    given.

    >>> from hooklens.testing import tiny_model
    >>> found = demo(tiny_model())
    >>> found.matching.source == found.matching.target, abs(found.mapped.value - found.home.value) < 1e-6
    (True, True)

    Reference: Wang et al. (2022), "Interpretability in the Wild" (roles of heads); Tigges et al. (2024), "LLM Circuit
    Analyses Are Consistent Across Training and Scale"; Merullo et al. (2023), "Circuit Component Reuse Across Tasks".
    """
    check_draws(draws)
    task, target_task = as_pairs(model, task), as_pairs(target, target_task)
    carrier = _checked(model, circuit, task, target, target_task)
    chosen, tested = halves(len(task), group=task.group, seed=seed)
    mine, theirs = task[chosen], target_task[chosen]
    found = (classify_heads(model, seed=seed), classify_heads(target, seed=seed)) if taxonomies is None else taxonomies
    evidence = comparable(*found)
    nodes = torch.isin(torch.arange(circuit.graph.n_sources), torch.tensor(carrier.nodes))
    ours = roles_of(model, mine, evidence[0], value=circuit.replacement, nodes=nodes)
    others = roles_of(target, theirs, evidence[1], value=circuit.replacement)
    places = match(carrier, ours, others)
    carried = _carried(circuit, carrier, places, target, theirs)
    home = _at_home(model, circuit, task[tested], draws, seed)
    nulls = [carrier.masks(draw(carrier, places, draws, seed=seed)) for draw in (random_maps, shuffled)]
    same_shape = circuit.graph.shape == carrier.target.shape
    circuits = [carried, _own(target, theirs, carried), *([circuit] if same_shape else [])]
    by_role, own, *by_index = _beside(target, target_task[tested], circuits, nulls[0], home)
    (in_layers,) = _beside(target, target_task[tested], [carried], nulls[1], home)
    return CircuitTransfer(
        source=model.cfg.model_name,
        target=target.cfg.model_name,
        matching=measure_matching(carrier, places, ours, others),
        home=home,
        mapped=by_role,
        in_layers=in_layers,
        own=own,
        by_index=by_index[0] if by_index else None,
        n_matched_on=len(chosen),
        n_different={
            name: len({mask.numpy().tobytes() for mask in null}) for name, null in zip(_NULLS, nulls, strict=True)
        },
    )


def _checked(model, circuit: Circuit, task: PromptPairs, target, target_task: PromptPairs) -> Carrier:
    """The circuit's edges, ready to be carried over, where the question can be asked at all."""
    circuit.check(model)
    carrier = Carrier(circuit, circuit_graph(target))
    if not carrier.heads:
        raise InputError(
            f"the circuit has {circuit.n_edges} edges and no head in them, and only heads have labels to be matched "
            "by; take a circuit with more edges"
        )
    if len(task) != len(target_task):
        raise InputError(
            f"both tasks hold the same texts in the same order, got {len(task)} pairs for {model.cfg.model_name!r} and "
            f"{len(target_task)} for {target.cfg.model_name!r}; leave out of both what one tokenizer cannot align"
        )
    mine, theirs = (group_numbers(len(one), one.group) for one in (task, target_task))
    if target_task.group is not None and not torch.equal(mine, theirs):
        raise InputError("the two tasks hold the same texts, but group their pairs differently; give both one group=")
    return carrier


def _carried(circuit: Circuit, carrier: Carrier, places: Tensor, target, task: PromptPairs) -> Circuit:
    """The circuit in the target's graph."""
    kept = carrier.masks(places[None])[0]
    method = f"{circuit.method}; carried over from {circuit.model_name} by role"
    scores, name = carrier.scores(circuit, places), target.cfg.model_name
    return Circuit(
        graph=carrier.target,
        kept=kept,
        scores=scores,
        method=method,
        replacement=circuit.replacement,
        model_name=name,
        dropped=0,
        found_on=task.digests(target),
    )


def _own(target, task: PromptPairs, carried: Circuit) -> Circuit:
    """A circuit of as many edges that the target itself shows."""
    if is_run(carried.replacement, "corrupted"):
        return eap_ig_midpoint(target, task).greedy_edges(max(1, carried.n_edges))
    return eap_ig_own_source(target, task, value=carried.replacement).greedy_edges(max(1, carried.n_edges))


def _at_home(model, circuit: Circuit, task: PromptPairs, draws: int, seed: int) -> Faithfulness:
    return measured(Bench(model, task, circuit.replacement, keep=True), circuit, draws, seed)


def _beside(
    target, task: PromptPairs, circuits: list[Circuit], null: Bool[Tensor, "draw edge"], home: Faithfulness
) -> list[Faithfulness]:
    """Circuits of the target, each beside the same random ones. The texts are those of `home`, seen or not."""
    bench = Bench(target, task, home.replacement, keep=True)
    own = torch.stack([circuit.kept.cpu() for circuit in circuits])
    runs = bench.run(torch.cat((own, null)))
    random, found = runs.per_pair[len(own) :], []
    for circuit, values in zip(circuits, runs.per_pair, strict=False):
        overlap = float((null & circuit.kept.cpu()).sum() / (len(null) * max(circuit.n_edges, 1)))
        beside = Faithfulness(
            circuit=circuit,
            per_pair=values,
            base_per_pair=runs.base_per_pair,
            empty_per_pair=runs.empty_per_pair,
            random_per_pair=random,
            overlap=overlap,
            group=home.group,
            n_seen=home.n_seen,
        )
        found.append(beside)
    return found


def _quantiles(values: Tensor) -> list[float]:
    return quantiles(values.double(), (0.05, 0.5, 0.95)).tolist()


def demo(model: "HookedTransformer") -> CircuitTransfer:
    """A few edges of a model, carried over to the same model; any model that reads tokens."""
    task = demo_pairs(model, 4)
    scores = eap(model, task.split()[0])
    sizes = [2**i for i in range(2, 30) if 2**i < scores.graph.n_edges]
    circuits = (scores.greedy_edges(size) for size in (*sizes, scores.graph.n_edges))
    circuit = next(one for one in circuits if any("H" in name for name in one.nodes))
    labels = classify_heads(model, n=6, draws=50, ioi=0)
    return transfer_circuit(model, circuit, task, model, task, taxonomies=(labels, labels))
