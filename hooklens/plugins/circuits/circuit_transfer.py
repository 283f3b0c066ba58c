"""Does a circuit found in one model exist in another? Nodes are matched by role and compared with random matchings."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.carry import Carrier, random_maps, shuffled
from hooklens.plugins.circuits.circuit import Circuit, need_circuit
from hooklens.plugins.circuits.edge_attribution import demo_circuit
from hooklens.plugins.circuits.faithfulness import LEAST_DRAWS, Faithfulness, check_draws
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.plugins.circuits.integrated_edges import eap_ig_midpoint, eap_ig_own_source
from hooklens.plugins.circuits.matching import Matching, match, measure_matching
from hooklens.plugins.circuits.roles import comparable, roles_of
from hooklens.plugins.circuits.run import Bench
from hooklens.plugins.heads.taxonomy import Taxonomy, classify_heads
from hooklens.plugins.weights.needs import Needs, needs_tokens
from hooklens.results.result import Result, Table
from hooklens.results.statistics import group_numbers, halves
from hooklens.sweeps.replacement import Replacement, is_run


@dataclass(frozen=True, eq=False)
class CircuitTransfer(Result):
    """A circuit in its own model and in another one, on pairs that were not used for roles and matching.

    `home` is the circuit in the source, with random circuits of the source. `mapped` is the circuit carried over by
    role, with circuits of as many edges on random heads; `in_layers` is the same with random heads of the matched
    layers, which shows what roles add beyond depth. `own` is a circuit of as many edges found in the target itself,
    and `by_index` has the same edges by name if both models have one shape (else None).

    Shares of the target are NaN if ablating all of it does not move the metric: the target does not do the task.
    `n_different` is the number of different random circuits. If it is small, no p-value can be small.
    """

    terms = {"p against random": "how often random circuits of as many edges are as faithful"}

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
        """What ablated edges and nodes carried in both models."""
        return self.mapped.replacement

    @property
    def p(self) -> float:
        """How often a circuit on random heads is at least as faithful as the one on matched heads."""
        return self.mapped.p

    def table(self, n: int | None = None) -> Table:
        """Faithfulness with its 95 % interval; for random circuits the median and the middle 90 %."""
        lost = f", {len(self.matching.lost)} of {self.matching.n_edges} edges lost"
        circuits = {
            f"in {self.source}": self.home,
            f"in {self.target}, by role{lost}": self.mapped,
            f"in {self.target}, same edges by name": self.by_index,
            f"{self.target}'s own ({self.own.circuit.method})": self.own,
        }
        rows: list[tuple] = []
        for name, result in circuits.items():
            if result is not None:
                p = result.p if result is self.home else None
                rows.append((name, result.circuit.n_edges, result.value, *result.interval(), p))
        for name, result in self._random.items():
            low, middle, high = result.random_range
            name = f"{name} ({len(result.random)} draws, {self.n_different[name]} different)"
            rows.append((name, result.circuit.n_edges, middle, low, high, result.p))
        return Table(("circuit", "edges", "faithfulness", "low", "high", "p against random"), rows).head(n)

    @property
    def _random(self) -> dict[str, Faithfulness]:
        """The results that hold the random circuits of each kind."""
        return dict(zip(self.n_different, (self.mapped, self.in_layers), strict=True))

    def figure(self) -> Any:
        """Faithfulness of each circuit beside random ones, whose whiskers span the middle 90 %."""
        from hooklens.viz.figures import bars

        shown = {self.source: self.home, f"{self.target}, own": self.own, f"{self.target}, by role": self.mapped}
        if self.by_index is not None:
            shown[f"{self.target}, by name"] = self.by_index
        rows = [(*result.interval(), result.value) for result in shown.values()]
        rows += [(low, high, middle) for low, middle, high in (result.random_range for result in self._random.values())]
        low, high, value = torch.tensor(rows, dtype=self.mapped.per_pair.dtype).T
        title = f"Does the circuit transfer? ({self.replacement} ablation, {len(self.mapped.per_pair)} held-out pairs)"
        marks = {"the model": 1.0, "no edge": 0.0}
        names = [*shown, *self.n_different]
        return bars(value.nan_to_num(), low, high, names, title, y_title="faithfulness", marks=marks)


def transfer_circuit(
    model: HookedTransformer,
    circuit: Circuit,
    task: PromptPairs,
    target: HookedTransformer,
    target_task: PromptPairs,
    *,
    taxonomies: tuple[Taxonomy, Taxonomy] | None = None,
    draws: int = LEAST_DRAWS,
    seed: int = 0,
) -> CircuitTransfer:
    """Does a circuit of `model` exist in `target`: another checkpoint, another seed, another architecture?

    The role of a node is what the task loses without it, under the circuit's own ablation, and for a head its label in
    the taxonomy. Nodes of the circuit are matched to nodes of the target by role (`match`) and its edges are carried
    over, except those that cannot exist in the target. The carried circuit is compared with `draws` circuits of as many
    edges on random heads, and with a circuit found in the target itself (EAP-IG at midpoints, grown from the logits).

    Roles are measured on one half of the pairs, faithfulness on the other: `halves(len(task), group=task.group,
    seed=seed)`, so that a circuit found on the first of these is tested on pairs it has not seen. The tasks hold the
    same texts in the same order, in the tokens of their models. `taxonomies` are those of both models, computed by
    default.

    >>> from hooklens.testing import tiny_model
    >>> found = demo(tiny_model())
    >>> found.matching.source == found.matching.target, abs(found.mapped.value - found.home.value) < 1e-6
    (True, True)

    Reference: Wang et al. (2022), "Interpretability in the Wild" (roles of heads); Tigges et al. (2024), "LLM Circuit
    Analyses Are Consistent Across Training and Scale"; Merullo et al. (2023), "Circuit Component Reuse Across Tasks".
    """
    need_circuit(circuit, "transfer_circuit")
    check_draws(draws)
    task, target_task = as_pairs(model, task), as_pairs(target, target_task)
    carrier = _checked(model, circuit, task, target, target_task)
    chosen, tested = halves(len(task), group=task.group, seed=seed)
    labels = (classify_heads(model, seed=seed), classify_heads(target, seed=seed)) if taxonomies is None else taxonomies
    evidence = comparable(*labels)
    nodes = torch.isin(torch.arange(circuit.graph.n_sources), torch.tensor(carrier.nodes))
    source_roles = roles_of(model, task[chosen], evidence[0], value=circuit.replacement, nodes=nodes)
    target_roles = roles_of(target, target_task[chosen], evidence[1], value=circuit.replacement)
    places = match(carrier, source_roles, target_roles)
    nulls = {
        "random heads": carrier.masks(random_maps(carrier, places, draws, seed=seed)),
        "random in same layers": carrier.masks(shuffled(carrier, places, draws, seed=seed)),
    }
    carried = _carried(circuit, carrier, places, target, target_task[chosen])
    circuits = [carried, _own(target, target_task[chosen], carried)]
    if circuit.graph.shape == carrier.target.shape:
        circuits.append(circuit)
    home = Faithfulness.of(circuit.bench(model, task[tested]), circuit, draws, seed)
    bench = Bench(target, target_task[tested], circuit.replacement, keep=True)
    results = Faithfulness.of_several(bench, circuits, nulls["random heads"])
    results += Faithfulness.of_several(bench, [carried], nulls["random in same layers"])
    # groups and seen prompts are those of `home`: the target has the same texts in other tokens
    results = [replace(result, group=home.group, n_seen=home.n_seen) for result in results]
    mapped, own, *by_index, in_layers = results
    return CircuitTransfer(
        source=model.cfg.model_name,
        target=target.cfg.model_name,
        matching=measure_matching(carrier, places, source_roles, target_roles),
        home=home,
        mapped=mapped,
        in_layers=in_layers,
        own=own,
        by_index=by_index[0] if by_index else None,
        n_matched_on=len(chosen),
        n_different={name: len(null.unique(dim=0)) for name, null in nulls.items()},
    )


def _checked(model, circuit: Circuit, task: PromptPairs, target, target_task: PromptPairs) -> Carrier:
    """The carrier of the circuit's edges; raises if circuit, tasks and target do not fit each other."""
    circuit.check(model)
    carrier = Carrier(circuit, circuit_graph(target))
    if not carrier.heads:
        raise InputError(
            f"the circuit has {circuit.n_edges} edges and no head in them, and matching needs the labels "
            "of heads; take a circuit with more edges"
        )
    if len(task) != len(target_task):
        raise InputError(
            f"both tasks must have the same texts in the same order, got {len(task)} pairs for "
            f"{model.cfg.model_name!r} and {len(target_task)} for {target.cfg.model_name!r}; leave out of both the "
            "pairs that one tokenizer cannot align"
        )
    source_group, target_group = (group_numbers(len(pairs), pairs.group) for pairs in (task, target_task))
    if target_task.group is not None and not torch.equal(source_group, target_group):
        raise InputError("the two tasks group their pairs differently; give both the same group=")
    return carrier


def _carried(circuit: Circuit, carrier: Carrier, places: Tensor, target, task: PromptPairs) -> Circuit:
    """The circuit in the target's graph."""
    return Circuit(
        graph=carrier.target,
        kept=carrier.masks(places[None])[0],
        scores=carrier.scores(circuit, places),
        method=f"{circuit.method}; carried over from {circuit.model_name} by role",
        replacement=circuit.replacement,
        model_name=target.cfg.model_name,
        found_on=task.digests(target),
    )


def _own(target, task: PromptPairs, carried: Circuit) -> Circuit:
    """A circuit of as many edges that is found in the target itself."""
    if is_run(carried.replacement, "corrupted"):
        return eap_ig_midpoint(target, task).greedy_edges(max(1, carried.n_edges))
    return eap_ig_own_source(target, task, value=carried.replacement).greedy_edges(max(1, carried.n_edges))


def demo(model: HookedTransformer) -> CircuitTransfer | Needs:
    """A few edges of a model, carried over to the same model; any model that reads tokens."""
    if lacks := needs_tokens(model):
        return lacks
    task = demo_pairs(model, 4)
    circuit = demo_circuit(model, task.split()[0], through="H")
    labels = classify_heads(model, n=6, draws=50, ioi=0)
    return transfer_circuit(model, circuit, task, model, task, taxonomies=(labels, labels))
