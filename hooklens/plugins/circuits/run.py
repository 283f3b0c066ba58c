"""Exact edge patching: run a model in which only some edges carry live values. Many circuits and prompts in a batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.progress import progress
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Pairs, Prompts, read_pairs
from hooklens.metrics import ReadingMetric
from hooklens.model.linear import packed_linears
from hooklens.plugins.circuits.graph import CircuitGraph, circuit_graph
from hooklens.plugins.circuits.nodes import ablated_run, check_ablation, refuse
from hooklens.plugins.circuits.runner import EdgeRunner, Kept, in_play, sources_of
from hooklens.results.result import Result, Table
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.settings import current

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

OneOrMore = Bool[Tensor, "*mask edge"] | Float[Tensor, "*mask edge"]
_POSITIONS = 512  # of one batch of rows: products are efficient from there on, and fewer circuits share more idle nodes


@dataclass(frozen=True, eq=False)
class EdgeRuns(Result):
    """The metric of every circuit on every pair, beside that of the model and of the run with every edge ablated."""

    per_pair: Float[Tensor, "mask pair"]
    model_per_pair: Float[Tensor, "pair"]
    empty_per_pair: Float[Tensor, "pair"]
    ablation: str

    @property
    def faithfulness(self) -> Float[Tensor, "mask"]:
        """(m(C) - m(empty)) / (m(M) - m(empty)), each a mean over pairs: 0 as ablated, 1 as the model."""
        empty = self.empty_per_pair.mean()
        return (self.per_pair.mean(1) - empty) / (self.model_per_pair.mean() - empty)

    def table(self, n: int | None = 20) -> Table:
        """One row a circuit."""
        rows = zip(range(len(self.per_pair)), self.per_pair.mean(1).tolist(), self.faithfulness.tolist(), strict=True)
        return Table(("circuit", "metric", "faithfulness"), list(rows)).head(n)


def run_edges(
    model: "HookedTransformer",
    kept: OneOrMore,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    ablation: str = "corrupted",
) -> EdgeRuns:
    """What does the model say when only these edges carry what it computes, and the others carry an ablated run?

    Every receiver reads the sum of what its sources wrote, live where the edge is kept, from the ablated run where not,
    through its own norm; a node's live output follows from what it read. All edges kept is the model on the clean
    prompt, none is the ablated run. Numbers between 0 and 1 mix the two.

    >>> from hooklens.testing import or_gate
    >>> model = or_gate(); graph = circuit_graph(model)
    >>> kept = torch.stack([graph.mask(["L0H0->MLP0", "MLP0->logits"]), graph.mask(["MLP0->logits"])])
    >>> run_edges(model, kept, [[0]], None, lambda logits: logits[:, -1, 1], ablation="zero").per_pair
    tensor([[1.],
            [0.]])

    `ablation` is "corrupted" (the run on the corrupted prompt), "zero" (nodes write nothing, biases of W_O stay) or
    "mean" (every node's mean over the corrupted prompts, by position; these may be any prompts of the same length). A
    plain function as metric sees all pairs at once, so that they are run together, whatever memory that takes.

    Reference: Conmy et al. (2023), "Towards Automated Circuit Discovery", section 3; Goldowsky-Dill et al. (2023),
    "Localizing Model Behavior with Path Patching", section 2.
    """
    return Bench(model, as_pairs(model, clean, corrupted, metric), ablation).run(kept)


class Bench:
    """A model, prompt pairs and a metric, ready to be asked about one set of circuits after another.

    With `keep` the ablated runs stay in memory between questions, where they fit.
    """

    def __init__(self, model: "HookedTransformer", pairs: PromptPairs, ablation: str, *, keep: bool = False):
        refuse(model)
        check_ablation(ablation)
        self.model, self.pairs, self.ablation = model, as_pairs(model, pairs), ablation
        self.metric, self.n_pairs = self.pairs.metric, len(pairs)
        self.graph = circuit_graph(model)
        self.groups = aligned_pairs(model, self.pairs, ablation)
        order = torch.tensor([i for group in self.groups for i in group.index])
        self.order = order.argsort().to(model.device)
        numbers = sum(group.clean.numel() for group in self.groups) * self.graph.n_sources * model.cfg.d_model
        self.keep = keep and numbers * model.dtype.itemsize <= current().memory
        self.kept_runners: list[EdgeRunner] = []
        with torch.no_grad():
            whole = [self._of_model(group) for group in self.groups]
        self.model_per_pair = torch.cat(whole)[self.order]
        if not bool(self.model_per_pair.isfinite().all()):
            raise InputError(
                "the metric of the model on the clean prompts is not finite; hooklens check shows where it begins"
            )

    def run(self, kept: OneOrMore) -> EdgeRuns:
        """The metric of every circuit on every pair."""
        masks = checked_masks(self.graph, kept)
        total = len(masks) * self.n_pairs
        bar = progress("circuits", total, unit="runs", show=False if total < 100 else None)
        values, empty = [], []
        with torch.no_grad(), packed_linears(rows=_POSITIONS), bar as advance:
            played = in_play(self.graph, masks, self.ablation)
            for runner in self._runners(played):
                positions = runner.n_pairs * runner.embedded.shape[1]
                at_once = max(
                    1, min(_POSITIONS, self._positions(int(sources_of(self.graph, played).sum()))) // positions
                )
                found = []
                for some in chunks(len(played), at_once):
                    found.append(runner.values(played[some]))
                    advance(len(found[-1]) * runner.n_pairs)
                values.append(torch.cat(found))
                empty.append(runner.reader.base)
        per_pair, nothing = torch.cat(values, 1)[:, self.order], torch.cat(empty)[self.order]
        if not bool(nothing.isfinite().all() & per_pair.isfinite().all()):
            raise InputError("the metric of the ablated run or of a circuit is not finite, though the model's own is")
        return EdgeRuns(per_pair, self.model_per_pair, nothing, self.ablation)

    def _of_model(self, group: Pairs) -> Float[Tensor, "pair"]:
        n, metric = len(group.index), group.of(self.metric)
        at_once = self._pairs_at_once(group.clean.shape[1], self.graph.n_layers, n)
        streams = (
            (rows, self.model(group.clean[rows], stop_at_layer=self.graph.n_layers)) for rows in chunks(n, at_once)
        )
        return torch.cat([Reader(self.model, of_pairs(metric, rows, n), stream).base for rows, stream in streams])

    def _runners(self, played: Kept) -> Iterator[EdgeRunner]:
        """Batches of pairs with their ablated run; only nodes in play are held, or all where runners are kept."""
        if self.kept_runners:
            yield from self.kept_runners
            return
        held = torch.ones(self.graph.n_sources, dtype=torch.bool) if self.keep else sources_of(self.graph, played)
        for group in self.groups:
            n, n_pos = group.clean.shape
            metric, shared = group.of(self.metric), None
            if self.ablation != "corrupted":
                shared = ablated_run(self.model, self.graph, group.corrupted, self.ablation, held)
            for rows in chunks(n, self._pairs_at_once(n_pos, int(held.sum()), n)):
                clean, corrupted = group.clean[rows], group.corrupted[rows]
                ablated = shared or ablated_run(self.model, self.graph, corrupted, self.ablation, held)
                first = first_difference(clean, corrupted) if ablated.past and self.model.cfg.causal else 0
                runner = EdgeRunner(
                    model=self.model,
                    graph=self.graph,
                    clean=clean,
                    metric=of_pairs(metric, rows, n),
                    ablated=ablated,
                    held=held,
                    first=first,
                )
                if self.keep:
                    self.kept_runners.append(runner)
                yield runner

    def _pairs_at_once(self, n_pos: int, n_sources: int, n: int) -> int:
        return max(1, self._positions(n_sources) // n_pos) if isinstance(self.metric, ReadingMetric) else n

    def _positions(self, n_sources: int) -> int:
        """How many fit the memory allowed: outputs of nodes, ablated and live, and what a layer's heads read."""
        receivers = self.graph.n_heads + 2 * self.graph.n_kv_heads
        a_position = (2 * n_sources + 4 * receivers + 8) * self.model.cfg.d_model * self.model.dtype.itemsize
        return current().memory // a_position


def checked_masks(graph: CircuitGraph, kept: OneOrMore) -> Kept:
    """Masks of this graph, one row each."""
    masks = torch.as_tensor(kept, device="cpu")
    masks = masks[None] if masks.ndim == 1 else masks
    if masks.ndim != 2 or masks.shape[1] != graph.n_edges or not len(masks):
        raise InputError(
            f"a mask of edges is [mask edge] with {graph.n_edges} edges for this model, got {list(masks.shape)}; "
            "circuit_graph(model).mask([...]) makes one"
        )
    return masks


def aligned_pairs(model: "HookedTransformer", pairs: PromptPairs, ablation: str) -> list[Pairs]:
    """The prompt pairs by length; each clean prompt is as long as its corrupted one."""
    if pairs.corrupted is None and ablation != "zero":
        raise InputError(f"ablation={ablation!r} needs corrupted prompts; only ablation='zero' does without")
    groups = read_pairs(model, pairs.clean, pairs.clean if pairs.corrupted is None else pairs.corrupted, ())
    for group in groups:
        if not group.aligned:
            read_pairs(model, group.clean, group.corrupted, ("pos",))  # raises: says where the two part
    if len(groups) > 1 and not isinstance(pairs.metric, ReadingMetric):
        raise InputError(
            f"prompts of {len(groups)} different lengths were given, and a plain function needs all pairs in one "
            "tensor; use a built-in metric, or prompts of one length"
        )
    return groups


def chunks(n: int, at_once: int) -> Iterator[slice]:
    """Slices of at most that many."""
    return (slice(i, min(i + at_once, n)) for i in range(0, n, at_once))


def of_pairs(metric: Any, rows: slice, n: int) -> Any:
    """The metric of some of n pairs."""
    if rows == slice(0, n) or len(metric.reads.pos) == 1:
        return metric
    return metric.pairs(torch.arange(rows.start, rows.stop))


def first_difference(clean: Tensor, corrupted: Tensor) -> int:
    """The first position at which any pair's prompts differ; the last one where none does."""
    differs = (clean != corrupted).any(0)
    return int(differs.long().argmax()) if bool(differs.any()) else clean.shape[1] - 1
