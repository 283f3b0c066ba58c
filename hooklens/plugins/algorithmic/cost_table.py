"""What models reach and what a forward pass costs, by hooklens's formula and by torch's counter."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hooklens.anatomy.description import describe
from hooklens.core.arguments import real
from hooklens.core.errors import InputError, WrongType, did_you_mean
from hooklens.model.attention import differentiable_attention
from hooklens.model.transformer import HookedTransformer
from hooklens.results.result import Result, Table

_MEASURES = ("MSE", "accuracy")


@dataclass(frozen=True, eq=False)
class MeasuredModel:
    """A model, inputs of which the first row is run, what was measured of it, and what it implements in a sentence."""

    name: str
    model: nn.Module
    inputs: Shaped[Tensor, "batch *pos"]
    measure: str
    value: float
    implements: str


@dataclass(frozen=True, eq=False)
class ModelCost(Result):
    """One row of the table. FLOPs are those of a forward pass over one sequence; None where the formula does not apply.

    `counted` is torch's count of the pass as it runs, `written_out` that with attention in separate products.
    """

    name: str
    measure: str
    value: float
    formula: str
    flops: int | None
    counted: int
    written_out: int
    attention: int
    implements: str

    @property
    def difference(self) -> str:
        """Why the count differs from the formula, in words; empty if it does not."""
        if self.flops is None:
            return "the formula is that of a HookedTransformer"
        if self.counted == self.flops:
            return ""
        if self.written_out == self.flops == self.counted + self.attention:
            return "torch does not count the fused attention kernel"
        surplus = self.written_out - self.flops
        return f"{abs(surplus)} operations {'more' if surplus > 0 else 'fewer'} than the formula, also unfused"


@dataclass(frozen=True, eq=False)
class CostTable(Result):
    """Models by what they reach, what they cost and what they implement."""

    terms = {
        "FLOPs": "floating-point operations of matrix products in a forward pass over one sequence, by formula",
        "torch": "the same by torch.utils.flop_counter, attention written out",
        "torch, as run": "the same for the pass as it runs, with the fused attention kernel where there is one",
    }

    costs: list[ModelCost]

    def table(self, n: int | None = None) -> Table:
        """One row a model."""
        columns = ("model", "measure", "value", "FLOPs", "torch", "torch, as run", "difference", "implements")
        rows = [
            (c.name, c.measure, c.value, c.flops, c.written_out, c.counted, c.difference, c.implements)
            for c in self.costs
        ]
        return Table(columns, rows).head(n)

    def formulas(self) -> Table:
        """The formula of each model, in the letters of `hl.describe`."""
        return Table(("model", "FLOPs"), [(c.name, c.formula) for c in self.costs])

    def figure(self) -> Any:
        """FLOPs by model."""
        from hooklens.viz.figures import bars

        values = torch.tensor([float(c.written_out) for c in self.costs], dtype=torch.float64)
        return bars(values, labels=[c.name for c in self.costs], y_title="FLOPs of a sequence")


def compare_costs(models: MeasuredModel | Sequence[Any]) -> CostTable:
    """What does each model reach, and what does one forward pass cost?

    The formula counts a multiplication and an addition as two operations, of matrix products alone, over all positions
    and the whole square of attention. With attention written out torch counts the same, for every HookedTransformer.
    Torch does not see into the fused kernel that runs where nothing listens to scores. Neither counts norms, softmax,
    activations, embeddings by index.

    >>> from hooklens.testing import tiny_model
    >>> entry = MeasuredModel("tiny", tiny_model(), torch.tensor([[1, 2, 3]]), "accuracy", 0.1, "nothing: it is random")
    >>> cost = compare_costs([entry]).costs[0]
    >>> cost.flops == cost.written_out, cost.difference
    (True, 'torch does not count the fused attention kernel')
    """
    models = [models] if isinstance(models, MeasuredModel) else models
    if not models:
        raise InputError("compare_costs needs at least one MeasuredModel; got none")
    for entry in models:
        if not isinstance(entry, MeasuredModel) or not isinstance(entry.model, nn.Module):
            raise WrongType(f"compare_costs takes MeasuredModel(name, model, inputs, ...) rows, got {entry!r:.80}")
        if entry.measure not in _MEASURES:
            raise did_you_mean("measure", entry.measure, _MEASURES)
        real("value", entry.value)
        axes = 1 + isinstance(entry.model, HookedTransformer)
        if not isinstance(entry.inputs, Tensor) or entry.inputs.ndim < axes or not len(entry.inputs):
            seen = list(entry.inputs.shape) if isinstance(entry.inputs, Tensor) else f"{entry.inputs!r:.60}"
            raise InputError(f"inputs are a tensor of at least one row, [batch{' pos' * (axes > 1)} ...]; got {seen}")
    return CostTable([_cost(entry) for entry in models])


def join_costs(studies: Sequence[Any]) -> CostTable:
    """One table over studies that have `costs`, such as those of grokking and of in-context regression.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.plugins.algorithmic.icl import GradientDescent, construct_descent
    >>> entry = MeasuredModel("tiny", tiny_model(), torch.tensor([[1, 2, 3]]), "accuracy", 0.1, "nothing: it is random")
    >>> step = construct_descent(GradientDescent((0.2,)), 2, 3)
    >>> by_hand = MeasuredModel("by hand", step, torch.zeros(1, 4, 3), "MSE", 0.5, "one step of gradient descent")
    >>> len(join_costs([compare_costs([entry]), compare_costs([by_hand])]).table())
    2
    """
    rows: list[ModelCost] = []
    if isinstance(studies, str) or not isinstance(studies, Sequence):
        raise WrongType(f"join_costs takes a list of studies, such as [study]; got {studies!r:.60}")
    for study in studies:
        costs = getattr(study, "costs", None)
        costs = costs.costs if isinstance(costs, CostTable) else costs
        if not isinstance(costs, list):
            raise WrongType(f"join_costs takes studies of grokking or in-context learning, got {study!r:.80}")
        rows += costs
    if not rows:
        raise InputError("join_costs needs at least one study; got none")
    return CostTable(rows)


def _cost(entry: MeasuredModel) -> ModelCost:
    row = entry.inputs[:1]
    flops, attention, formula = None, 0, ""
    if isinstance(entry.model, HookedTransformer):
        described = describe(entry.model, n=row.shape[1])
        flops, parts = described.flops, [c for c in described.components if c.flops]
        attention = sum(c.flops for c in parts if c.name in ("attn.scores", "attn.z"))
        formula = " + ".join(f"{n} x {term}" for term, n in Counter(c.flops_formula for c in parts).items())
    with differentiable_attention():
        written_out = count_flops(entry.model, row)
    return ModelCost(
        name=entry.name,
        measure=entry.measure,
        value=float(entry.value),
        formula=formula,
        flops=flops,
        counted=count_flops(entry.model, row),
        written_out=written_out,
        attention=attention,
        implements=entry.implements,
    )


def count_flops(module: nn.Module, inputs: Shaped[Tensor, "batch *pos"]) -> int:
    """Floating-point operations of a forward pass, as torch.utils.flop_counter counts them.

    >>> count_flops(nn.Linear(3, 5, bias=False), torch.zeros(2, 3))
    60
    """
    with _evaluating(module), FlopCounterMode(display=False) as counter, torch.no_grad():
        module(inputs)
    return int(counter.get_total_flops())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout, which would draw from the global generator."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
