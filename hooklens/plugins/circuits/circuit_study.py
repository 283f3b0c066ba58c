"""A circuit from prompt pairs of one's own: found on one half, tested on the other, beside random circuits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hooklens.core.errors import InputError
from hooklens.data.jsonl import PromptPairs, numbered
from hooklens.metrics import logit_diff
from hooklens.plugins.circuits.circuit import Circuit
from hooklens.plugins.circuits.eap import demo_pairs
from hooklens.plugins.circuits.eap_ig import eap_ig
from hooklens.plugins.circuits.faithful import faithfulness
from hooklens.plugins.circuits.measure import Faithfulness
from hooklens.result import Result, Table
from hooklens.statistics import halves

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


@dataclass(frozen=True, eq=False)
class CircuitStudy(Result):
    """The circuit, and how faithful it is on pairs that it was not found on.

    `held_out` is False where there was one group of pairs only: the test is then on the pairs of the search, and says
    less.
    """

    model: str
    circuit: Circuit
    faithfulness: Faithfulness
    n_found_on: int
    n_tested_on: int
    held_out: bool

    def table(self, n: int | None = None) -> Table:
        """The faithfulness beside random circuits, and what it was measured on."""
        seen = "not seen in the search" if self.held_out else "the same as in the search"
        rows = [*self.faithfulness.table().rows, ("pairs of the search", self.n_found_on)]
        return Table(("what", "value"), [*rows, (f"pairs of the test, {seen}", self.n_tested_on)]).head(n)

    def top(self, k: int = 10) -> Table:
        """The `k` edges with the largest scores."""
        return self.circuit.top(k)

    def figure(self) -> Any:
        """The circuit, drawn upwards."""
        return self.circuit.figure()

    def report(self) -> Any:
        """The study as a page."""
        from hooklens.viz.report import Report

        report = Report(f"A circuit of {self.circuit.n_edges} edges in {self.model}")
        report.text(
            "Edges by integrated gradients between corrupted and clean prompts; every other edge carries the corrupted "
            "run. A faithful circuit is one way in which these prompts can be answered, not the only one."
        )
        report.figure(self.figure()).table(self.circuit.top(20), "The edges with the largest scores.")
        return report.heading("Against random circuits").figure(self.faithfulness.figure()).table(self.table())


def study_circuit(
    model: "HookedTransformer", pairs: PromptPairs, *, edges: int = 200, draws: int = 100, seed: int = 0
) -> CircuitStudy:
    """Which edges carry the answer of these pairs? Found on one half of their groups, tested on the other.

    >>> from hooklens.testing import tiny_model
    >>> found = demo(tiny_model())
    >>> found.held_out, found.circuit.n_edges <= 12
    (True, True)
    """
    if edges < 1:
        raise InputError(f"edges is the number of edges that a circuit may have, at least 1, got {edges}")
    group = numbered(pairs.group)
    held_out = int(group.max()) > 0
    every = torch.arange(len(pairs))
    found_on, tested_on = halves(len(pairs), group=group, seed=seed) if held_out else (every, every)
    metric = logit_diff(model, answer=pairs.answer, wrong_answer=pairs.wrong_answer)
    one, other = (_some(pairs, index.tolist()) for index in (found_on, tested_on))
    scores = eap_ig(model, *one, metric.pairs(found_on) if len(pairs) > 1 else metric)
    circuit = scores.top_edges(edges)
    tested = metric.pairs(tested_on) if len(pairs) > 1 else metric
    faithful = faithfulness(model, circuit, *other, tested, group=group[tested_on], draws=draws, seed=seed)
    return CircuitStudy(model.cfg.model_name, circuit, faithful, len(found_on), len(tested_on), held_out)


def _some(pairs: PromptPairs, index: list[int]) -> tuple[list[Any], list[Any]]:
    return [pairs.clean[i] for i in index], [pairs.corrupted[i] for i in index]


def demo(model: "HookedTransformer") -> CircuitStudy:
    """Four pairs of token numbers, a circuit of at most twelve edges; any model, no tokenizer needed."""
    clean, corrupted, _ = demo_pairs(model, 4)
    answers = [int(x) for x in clean[:, 0]], [int(x) for x in corrupted[:, -1]]
    pairs = PromptPairs(clean.tolist(), corrupted.tolist(), *answers, [str(i) for i in range(len(clean))])
    return study_circuit(model, pairs, edges=12)
