"""Faithfulness as a result: a circuit, the model, no edge at all, and random circuits, measured on the same prompts."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import ArgumentError
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.random_draws import random_circuits
from hooklens.plugins.circuits.run import Bench
from hooklens.results.result import Result, Table
from hooklens.results.statistics import group_numbers, null_p, quantiles, ratio_interval
from hooklens.sweeps.replacement import Replacement

LEAST_DRAWS = 100  # random circuits: each runs on every pair; with fewer no p lies below 0.01


@dataclass(frozen=True, eq=False)
class Faithfulness(Result):
    """The metric of a circuit, of the model, of no edge at all, and of random circuits of the same make, pair by pair.

    `n_seen` of the pairs are ones that the circuit was found on: only 0 makes this an evaluation on held-out prompts.
    `overlap` is the share of the circuit's edges that a random one has too, on average: what the control cannot see.
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
    def defined(self) -> bool:
        """Does ablating everything move the metric by more than chance over groups of pairs?"""
        return defined(self.base_per_pair - self.empty_per_pair, self.group)

    @property
    def value(self) -> float:
        """(m(C) - m(empty)) / (m(M) - m(empty)): 0 as ablated, 1 as the model; NaN where that is not defined."""
        return float(self.share(self.per_pair[None])[0])

    @property
    def random(self) -> Float[Tensor, "draw"]:
        """The same of every random circuit."""
        return self.share(self.random_per_pair)

    @property
    def p(self) -> float:
        """How often a random circuit is at least as close to 1, the circuit itself counted in."""
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
        low, high = ratio_interval(above, self.base_per_pair - self.empty_per_pair, group=self.group)
        return float(low[0]), float(high[0])

    def share(self, values: Float[Tensor, "row pair"]) -> Float[Tensor, "row"]:
        """The normalised metric of these values, one row a circuit; NaN where it is not defined."""
        empty, whole = self.empty_per_pair.mean(), self.base_per_pair.mean()
        shares = (values.mean(1) - empty) / (whole - empty)
        return shares if self.defined else torch.full_like(shares, torch.nan)

    def table(self, n: int | None = None) -> Table:
        """What it comes to, in rows."""
        low, high = self.interval()
        ends = quantiles(self.random.double(), (0.05, 0.5, 0.95)).tolist()
        rows = [
            ("faithfulness", self.value),
            ("95% low", low),
            ("95% high", high),
            (f"random circuits ({len(self.random)}): median", ends[1]),
            ("random circuits: 5%", ends[0]),
            ("random circuits: 95%", ends[2]),
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
        marks, found = {"the model": 1.0, "no edge": 0.0}, {"the circuit": (self.value, *self.interval())}
        return beside(found, self.random, title, x_title="faithfulness", drawn="random circuits", marks=marks)


def check_draws(draws: int) -> None:
    """Beside how many random circuits may a circuit be judged?"""
    if draws < LEAST_DRAWS:
        raise ArgumentError(
            "{draws} must be at least {0} random circuits to compare with, got {1}: their spread and p-values down to "
            "0.01 need as many",
            LEAST_DRAWS,
            draws,
        )


def measured(bench: Bench, circuit: Circuit, draws: int, seed: int) -> Faithfulness:
    """The faithfulness of one circuit, on a bench that may be used for more."""
    null = random_circuits(bench.graph, circuit.kept, draws, seed=seed)
    runs = bench.run(torch.cat((circuit.kept[None].cpu(), null)))
    overlap = float((null & circuit.kept.cpu()).sum() / (draws * max(circuit.n_edges, 1)))
    seen = sum(mark in set(circuit.found_on) for mark in bench.pairs.digests(bench.model))
    values, random = runs.per_pair[0], runs.per_pair[1:]
    return Faithfulness(
        circuit=circuit,
        per_pair=values,
        base_per_pair=runs.base_per_pair,
        empty_per_pair=runs.empty_per_pair,
        random_per_pair=random,
        overlap=overlap,
        group=group_numbers(bench.n_pairs, bench.pairs.group),
        n_seen=seen,
    )


def defined(gap: Float[Tensor, "pair"], group: Int[Tensor, "pair"]) -> bool:
    """Does the interval of the mean gap exclude 0? With one group: is it other than 0?"""
    if int(group.max()) < 1:
        return bool(gap.mean() != 0)
    low, high = ratio_interval(gap[:, None], torch.ones_like(gap), group=group)
    return not bool(low[0] <= 0 <= high[0])


def tied_p(value: Float[Tensor, "*cell"], null: Float[Tensor, "draw *cell"]) -> Float[Tensor, "*cell"]:
    """How often a draw reaches the value; draws that differ from it by rounding alone reach it.

    >>> tied_p(torch.tensor(1.0), torch.tensor([1.0 - 1e-7, 0.5])).item()
    0.666...

    Random circuits may well be the circuit itself, whose value then depends on the order of a sum.
    """
    return null_p(value.to(null) - slack(null), null)


def slack(values: Tensor) -> float:
    """By how much sums of this precision may differ when taken in another order."""
    return torch.finfo(values.dtype).eps ** 0.5
