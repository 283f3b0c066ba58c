"""Exact edge patching: run a model in which only some edges carry live values. Many circuits and prompts in a batch."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.errors import InputError, WrongType
from hooklens.core.fingerprint import identity
from hooklens.core.progress_bar import progress
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Pairs, Prompts, read_aligned
from hooklens.metrics import ReadingMetric
from hooklens.model.linear import kernel_of
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.circuits.graph import CircuitGraph, circuit_graph
from hooklens.plugins.circuits.node_runs import ablated_runs, refuse
from hooklens.plugins.circuits.runner import EdgePatches, EdgeRunner, Kept, in_play, sources_of
from hooklens.plugins.patching.activation import check_metric
from hooklens.results.account import RunAccount
from hooklens.results.result import Result, Table
from hooklens.sweeps.execution import run_parts
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.replacement import Replacement, Value, as_replacement, is_run
from hooklens.sweeps.resume import Progressed, Resume, key_of, products_of, resuming, sketch_of
from hooklens.sweeps.settings import current, engine

OneOrMore = Bool[Tensor, "*mask edge"] | Float[Tensor, "*mask edge"]


@dataclass(frozen=True, eq=False)
class EdgeRuns(RunAccount, Result):
    """The metric of every circuit on every pair, beside that of the model and of the run with every edge ablated."""

    per_pair: Float[Tensor, "mask pair"]
    base_per_pair: Float[Tensor, "pair"]
    empty_per_pair: Float[Tensor, "pair"]
    replacement: str

    @property
    def faithfulness(self) -> Float[Tensor, "mask"]:
        """(m(C) - m(empty)) / (m(M) - m(empty)), each a mean over pairs: 0 as ablated, 1 as the model."""
        empty = self.empty_per_pair.mean()
        return (self.per_pair.mean(1) - empty) / (self.base_per_pair.mean() - empty)

    def table(self, n: int | None = 20) -> Table:
        """One row a circuit."""
        rows = zip(range(len(self.per_pair)), self.per_pair.mean(1).tolist(), self.faithfulness.tolist(), strict=True)
        return Table(("circuit", "metric", "faithfulness"), list(rows)).head(n)


def run_edges(
    model: HookedTransformer,
    kept: OneOrMore,
    clean: Prompts | PromptPairs,
    corrupted: Prompts | None = None,
    metric: Any = None,
    *,
    value: Value = "corrupted",
    resume: str | Path | Resume | None = None,
) -> EdgeRuns:
    """The metric when only these edges carry the live values of the model, and all others those of an ablated run.

    Every receiver reads the sum of what its sources wrote, live where the edge is kept, from the ablated run where not,
    through its own norm; a node's live output follows from what it read. All edges kept is the model on the clean
    prompt, none is the ablated run. A mask of numbers between 0 and 1 instead of True and False mixes the two.

    >>> from hooklens.testing import or_gate
    >>> model = or_gate(); graph = circuit_graph(model)
    >>> kept = torch.stack([graph.mask(["L0H0->MLP0", "MLP0->logits"]), graph.mask(["MLP0->logits"])])
    >>> run_edges(model, kept, [[0]], None, lambda logits: logits[:, -1, 1], value="zero").per_pair
    tensor([[1.],
            [0.]])

    `value` is what ablated edges carry, as in `hl.patch`: "corrupted" (the run on the corrupted prompt), "zero" (nodes
    write nothing, biases of W_O stay), "mean" (every node's mean over the clean prompts), or any other `Replacement`,
    such as Mean(reference=prompts). A plain function as metric needs all pairs at once, so they are run together,
    whatever memory that takes. `resume` names a file that keeps finished circuits, as in `hl.patch`. A circuit is
    run again by hooks on the model's own forward pass (two of many); the largest difference is in the result.

    Reference: Conmy et al. (2023), "Towards Automated Circuit Discovery", section 3; Goldowsky-Dill et al. (2023),
    "Localizing Model Behavior with Path Patching", section 2.
    """
    kept = checked_shares(circuit_graph(model), kept)  # before the model runs
    with resuming(resume, "run_edges") as file:
        return Bench(model, as_pairs(model, clean, corrupted, metric), value, resume=file).run(kept)


class Bench:
    """A model, prompt pairs and a metric, on which one set of circuits after another is run.

    With `keep` the ablated runs stay in memory between questions, where they fit. `resume`: a file for one question.
    """

    empty_per_pair: Float[Tensor, "pair"]  # the metric with every edge ablated, known from the first question on

    def __init__(
        self,
        model: HookedTransformer,
        pairs: PromptPairs,
        value: Value,
        *,
        keep: bool = False,
        resume: str | Path | Resume | None = None,
    ):
        refuse(model)
        self.model, self.pairs, self.replacement = model, as_pairs(model, pairs), as_replacement(value)
        self.metric, self.n_pairs = self.pairs.metric, len(pairs)
        self.graph = circuit_graph(model)
        self.groups = aligned_pairs(model, self.pairs, self.replacement)
        order = torch.tensor([i for group in self.groups for i in group.index])
        self.order = order.argsort().to(model.device)
        self.file, self.checked = Resume.of(resume), False
        if self.file is not None:  # before the metric is called for the first time, which may change what it refers to
            asked = "circuits", [(group.index, group.clean, group.corrupted) for group in self.groups]
            self.key = key_of(model, (asked, {"the value to write": self.replacement}), self.metric, self.file)
        numbers = sum(group.clean.numel() for group in self.groups) * self.graph.n_sources * model.cfg.d_model
        self.keep = keep and numbers * model.dtype.itemsize <= current().memory
        self.kept_runners: list[EdgeRunner] = []
        with torch.no_grad():
            base = torch.cat([part for group in self.groups for part in self._of_model(group)])
        self.base_per_pair = base[self.order]
        if not bool(base.isfinite().all()):
            raise InputError(
                "the metric of the model on the clean prompts is not finite; hooklens check shows where it begins"
            )

    @property
    def base(self) -> float:
        """The metric of the model, mean over pairs."""
        return float(self.base_per_pair.mean())

    def digests(self) -> list[str]:
        """A digest of every clean prompt, to recognise it in another evaluation."""
        return self.pairs.digests(self.model)

    def tidy(self, kept: Bool[Tensor, "edge"]) -> Bool[Tensor, "edge"]:
        """The kept edges of one circuit that can change anything under this ablation."""
        return self.graph.on_a_path(kept[None], rooted=self.replacement.from_runs)[0]

    def run(self, kept: OneOrMore) -> EdgeRuns:
        """The metric of every circuit on every pair. Numbers outside 0 to 1 extrapolate, as a derivative needs."""
        masks = checked_masks(self.graph, kept)
        played = in_play(self.graph, masks, rooted=self.replacement.from_runs)
        values = self.base_per_pair.new_empty(len(masks), self.n_pairs)
        at_once = self._positions(int(sources_of(self.graph, played).sum()))
        total = len(masks) * self.n_pairs
        bar = progress("circuits", total, unit="runs", show=False if total < 100 else None)
        checks = engine(verify=0) if self.checked else nullcontext()  # one question of a bench is run both ways
        with products_of(self.file), bar as advance, checks:
            file = None if self.file is None else self._progressed(masks, values)
            runners = self._runners(played)
            parts = ((EdgePatches(runner, played, masks, at_once), runner.reader) for runner in runners)
            outcomes = run_parts(parts, values, kept=file, advance=advance)
        self.checked, self.empty_per_pair = True, torch.cat([outcome.base for outcome in outcomes])[self.order]
        return EdgeRuns(
            per_pair=values[:, self.order],
            base_per_pair=self.base_per_pair,
            empty_per_pair=self.empty_per_pair,
            replacement=str(self.replacement),
            **RunAccount.joined(outcomes, [len(outcome.base) for outcome in outcomes]).account,
        )

    def means(self, kept: OneOrMore) -> Float[Tensor, "mask"]:
        """The metric of every circuit, mean over pairs, on the CPU."""
        return self.run(kept).per_pair.mean(1).cpu()

    def _progressed(self, masks: Kept, values: Float[Tensor, "mask pair"]) -> Progressed:
        assert self.file is not None
        key = identity((self.key, masks), "the circuits")
        return Progressed(self.file, key, sketch_of(self.base_per_pair, ()), values, kernel_of(self.model))

    def _of_model(self, group: Pairs) -> Iterator[Float[Tensor, "pair"]]:
        """The metric of the model, for some of the group's pairs at a time."""
        for rows, metric in batches(group, self.metric, self._pairs_at_once(group, self.graph.n_layers)):
            stream = self.model(group.clean[rows], stop_at_layer=self.graph.n_layers)
            yield Reader(self.model, metric, stream).base

    def _runners(self, played: Kept) -> Iterator[EdgeRunner]:
        """Batches of pairs with their ablated run, which has the nodes in play only, or all if runners are kept."""
        if self.kept_runners:
            yield from self.kept_runners
            return
        held = None if self.keep else sources_of(self.graph, played)
        n_held = self.graph.n_sources if held is None else int(held.sum())
        for group, ablated_of in ablated_runs(self.model, self.graph, self.groups, self.replacement):
            for rows, metric in batches(group, self.metric, self._pairs_at_once(group, n_held)):
                runner = EdgeRunner(
                    self.model, self.graph, group, rows, metric=metric, ablated_of=ablated_of, held=held
                )
                if self.keep:
                    self.kept_runners.append(runner)
                yield runner

    def _pairs_at_once(self, group: Pairs, n_sources: int) -> int:
        return max(1, self._positions(n_sources) // group.clean.shape[1])

    def _positions(self, n_sources: int) -> int:
        """How many fit the memory allowed: outputs of nodes, ablated and live, and what a layer's heads read."""
        receivers = self.graph.n_heads + 2 * self.graph.n_kv_heads
        a_position = (2 * n_sources + 4 * receivers + 8) * self.model.cfg.d_model * self.model.dtype.itemsize
        return current().memory // a_position


def checked_masks(graph: CircuitGraph, kept: OneOrMore) -> Kept:
    """Masks of this graph, one row each: True and False, or finite numbers."""
    try:
        masks = torch.as_tensor(kept, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongType(_not_a_mask(graph, f"{kept!r:.80}")) from error
    if masks.is_complex():
        raise WrongType(_not_a_mask(graph, str(masks.dtype)))
    rows = masks[None] if masks.ndim == 1 else masks
    if rows.ndim != 2 or rows.shape[1] != graph.n_edges or not len(rows):
        raise InputError(_not_a_mask(graph, str(list(masks.shape))))
    if not bool(rows.isfinite().all()):
        raise InputError(_not_a_mask(graph, "NaN or an infinite number"))
    return rows


def checked_shares(graph: CircuitGraph, kept: OneOrMore) -> Kept:
    """Masks of this graph whose numbers lie between 0 and 1."""
    masks = checked_masks(graph, kept)
    outside = masks[(masks < 0) | (masks > 1)]
    if len(outside):
        raise InputError(_not_a_mask(graph, f"{outside[0].item():g}"))
    return masks


def _not_a_mask(graph: CircuitGraph, got: str) -> str:
    return (
        f"a mask of edges is a tensor [mask edge] with {graph.n_edges} edges for this model, of True and False or of "
        f"numbers between 0 and 1, got {got}; circuit_of(model, [...]).kept and circuit_graph(model).mask([...]) are "
        "masks"
    )


def aligned_pairs(model: HookedTransformer, pairs: PromptPairs, replacement: Replacement) -> list[Pairs]:
    """The prompt pairs grouped by length. A clean prompt must be as long as its corrupted one."""
    if pairs.corrupted is None and is_run(replacement, "corrupted"):
        raise InputError("value='corrupted' needs corrupted prompts; value='zero', for example, does without")
    groups = read_aligned(model, pairs.clean, pairs.clean if pairs.corrupted is None else pairs.corrupted)
    check_metric(pairs.metric, groups)
    return groups


def chunks(n: int, at_once: int) -> Iterator[slice]:
    """Slices of at most that many."""
    return (slice(i, min(i + at_once, n)) for i in range(0, n, at_once))


def batches(group: Pairs, metric: Any, at_once: int) -> Iterator[tuple[slice, Any]]:
    """Rows of a group, at most so many at once, each with their metric; a plain function needs all rows together."""
    n, of_group = len(group.clean), group.of(metric)
    for rows in chunks(n, at_once if isinstance(metric, ReadingMetric) else n):
        whole = rows == slice(0, n) or len(of_group.reads.pos) == 1
        yield rows, of_group if whole else of_group.pairs(torch.arange(rows.start, rows.stop))
