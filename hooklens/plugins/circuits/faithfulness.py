"""Faithfulness of a circuit: the metric of its edges alone, compared with the model, no edge, and random circuits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.errors import ArgumentError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.circuit import Circuit, need_circuit
from hooklens.plugins.circuits.edge_attribution import demo_circuit
from hooklens.plugins.circuits.random_draws import random_circuits
from hooklens.plugins.circuits.run import Bench
from hooklens.results.result import Result, Table
from hooklens.results.statistics import group_numbers, null_p, quantiles, ratio_interval
from hooklens.sweeps.replacement import Replacement

LEAST_DRAWS = 100  # random circuits: each runs on every pair; with fewer no p lies below 0.01


@dataclass(frozen=True, eq=False)
class Faithfulness(Result):
    """The metric of a circuit, of the model, of no edge at all, and of random circuits, pair by pair.

    `n_seen` is the number of pairs that the circuit was found on: held-out prompts have 0. `overlap` is the share of
    the circuit's edges that a random circuit has too, on average: the control says nothing about these.
    """

    baselines = ("value",)
    circuit: Circuit
    per_pair: Float[Tensor, "pair"]
    base_per_pair: Float[Tensor, "pair"]
    empty_per_pair: Float[Tensor, "pair"]
    random_per_pair: Float[Tensor, "draw pair"]
    overlap: float
    group: Int[Tensor, "pair"]
    n_seen: int

    @property
    def replacement(self) -> Replacement:
        """What the edges outside the circuit carried."""
        return self.circuit.replacement

    @property
    def gap(self) -> Float[Tensor, "pair"]:
        """What ablating every edge takes from the metric."""
        return self.base_per_pair - self.empty_per_pair

    @property
    def defined(self) -> bool:
        """Does ablating everything move the metric by more than chance over groups of pairs? One group: at all?"""
        if int(self.group.max()) < 1:
            return bool(self.gap.mean() != 0)
        low, high = ratio_interval(self.gap[:, None], torch.ones_like(self.gap), group=self.group)
        return not bool(low[0] <= 0 <= high[0])

    @property
    def unit(self) -> Float[Tensor, ""]:
        """What ablating every edge takes from the metric on average, without its sign; NaN where not `defined`."""
        size = self.gap.mean().abs()
        return size if self.defined else torch.full_like(size, torch.nan)

    @property
    def value(self) -> float:
        """(m(C) - m(empty)) / (m(M) - m(empty)): 0 as ablated, 1 as the model; NaN where that is not defined."""
        return float(self.share(self.per_pair[None])[0])

    @property
    def random(self) -> Float[Tensor, "draw"]:
        """The same of every random circuit."""
        return self.share(self.random_per_pair)

    @property
    def random_range(self) -> list[float]:
        """The 5 %, 50 % and 95 % quantiles of the random circuits."""
        return quantiles(self.random.double(), (0.05, 0.5, 0.95)).tolist()

    @property
    def p(self) -> float:
        """How often a random circuit is at least as close to 1, with the circuit itself counted."""
        own = self.share(self.per_pair[None])[0]
        return float(tied_p(-(1 - own).abs(), -(1 - self.random).abs()))

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `value`, over groups of pairs; NaN for one group."""
        return self.interval_of(self.per_pair)

    def interval_of(self, values: Float[Tensor, "pair"]) -> tuple[float, float]:
        """The same for other values of these pairs."""
        if not self.defined:
            return float("nan"), float("nan")
        above = (values - self.empty_per_pair)[:, None]
        low, high = ratio_interval(above, self.gap, group=self.group)
        return float(low[0]), float(high[0])

    def share(self, values: Float[Tensor, "row pair"]) -> Float[Tensor, "row"]:
        """The normalised metric of these values, one row a circuit; NaN where it is not defined."""
        empty, whole = self.empty_per_pair.mean(), self.base_per_pair.mean()
        shares = (values.mean(1) - empty) / (whole - empty)
        return shares if self.defined else torch.full_like(shares, torch.nan)

    @classmethod
    def of(cls, bench: Bench, circuit: Circuit, draws: int, seed: int) -> "Faithfulness":
        """The faithfulness of one circuit, on a bench that may be used for more."""
        return cls.of_several(bench, [circuit], random_circuits(bench.graph, circuit.kept, draws, seed=seed))[0]

    @classmethod
    def of_several(
        cls, bench: Bench, circuits: Sequence[Circuit], null: Bool[Tensor, "draw edge"]
    ) -> list["Faithfulness"]:
        """The faithfulness of circuits, each compared with the same random ones."""
        kept = torch.stack([circuit.kept.cpu() for circuit in circuits])
        runs, marks = bench.run(torch.cat((kept, null))), bench.digests()
        return [
            cls(
                circuit=circuit,
                per_pair=values,
                base_per_pair=runs.base_per_pair,
                empty_per_pair=runs.empty_per_pair,
                random_per_pair=runs.per_pair[len(circuits) :],
                overlap=float((null & own).sum() / (len(null) * max(circuit.n_edges, 1))),
                group=group_numbers(bench.n_pairs, bench.pairs.group),
                n_seen=sum(mark in circuit.found_on for mark in marks),
            )
            for circuit, own, values in zip(circuits, kept, runs.per_pair, strict=False)
        ]

    def table(self, n: int | None = None) -> Table:
        """Faithfulness with its interval, that of random circuits, and the metrics behind it."""
        (low, high), (least, middle, most) = self.interval(), self.random_range
        rows = [
            ("faithfulness", self.value),
            ("95% low", low),
            ("95% high", high),
            (f"random circuits ({len(self.random)}): median", middle),
            ("random circuits: 5%", least),
            ("random circuits: 95%", most),
            ("p against random circuits", self.p),
            ("edges that a random circuit shares", self.overlap),
            ("metric of the circuit", float(self.per_pair.mean())),
            ("metric of the model", float(self.base_per_pair.mean())),
            (f"metric of no edge ({self.replacement} ablation)", float(self.empty_per_pair.mean())),
            ("edges", self.circuit.n_edges),
            ("prompt pairs", len(self.per_pair)),
            ("of these used to find it", self.n_seen),
        ]
        return Table(("what", "value"), rows).head(n)

    def figure(self) -> Any:
        """Faithfulness of the circuit, with its interval, among the random ones."""
        from hooklens.viz.curves import beside

        title = f"Faithfulness of {self.circuit.n_edges} edges beside random circuits ({self.replacement} ablation)"
        marks, own = {"the model": 1.0, "no edge": 0.0}, {"the circuit": (self.value, *self.interval())}
        return beside(own, self.random, title, x_title="faithfulness", drawn="random circuits", marks=marks)


def measure_faithfulness(
    model: HookedTransformer,
    circuit: Circuit,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    group: Int[Tensor, "pair"] | None = None,
    draws: int = LEAST_DRAWS,
    seed: int = 0,
) -> Faithfulness:
    """How much of the model's metric is left when only the circuit's edges are live, compared with random circuits?

    Give prompts that the circuit was not found on. `group` says which pairs share names or a sentence: intervals
    resample whole groups. Random circuits have as many edges between the same layers and kinds, on whole paths.

    >>> from hooklens.testing import tiny_model
    >>> found = demo(tiny_model())
    >>> found.random.shape, 0 < found.p <= 1, str(found.replacement)
    (torch.Size([100]), True, 'corrupted')

    Reference: Wang et al. (2022), "Interpretability in the Wild", section 4; Hanna et al. (2024), "Have Faith in
    Faithfulness", section 2 (normalised).
    """
    need_circuit(circuit, "measure_faithfulness")
    check_draws(draws)
    return Faithfulness.of(circuit.bench(model, clean, corrupted, metric, group=group), circuit, draws, seed)


def check_draws(draws: int) -> None:
    """Raise if there are too few random circuits to compare with."""
    if draws < LEAST_DRAWS:
        raise ArgumentError(
            "{draws} must be at least {0} random circuits to compare with, got {1}: their spread and p-values down to "
            "0.01 need as many",
            LEAST_DRAWS,
            draws,
        )


def tied_p(value: Float[Tensor, "*cell"], null: Float[Tensor, "draw *cell"]) -> Float[Tensor, "*cell"]:
    """How often a draw reaches the value; draws that differ from it by rounding alone reach it.

    >>> tied_p(torch.tensor(1.0), torch.tensor([1.0 - 1e-7, 0.5])).item()
    0.666...

    A random circuit may be the circuit itself, whose value then depends on the order of a sum.
    """
    return null_p(value.to(null) - slack(null), null)


def slack(values: Tensor) -> float:
    """By how much sums of this precision may differ when taken in another order."""
    return torch.finfo(values.dtype).eps ** 0.5


def demo(model: HookedTransformer) -> Faithfulness:
    """A few edges found on two short prompt pairs, evaluated on two others; numbers without a tokenizer."""
    pairs = demo_pairs(model, 4)
    return measure_faithfulness(model, demo_circuit(model, pairs[:2]), pairs[2:])
