"""Run a sweep: only the rows that can change, only the layers above, many patches in one matrix."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.progress_bar import Advance, progress, within
from hooklens.model.linear import kernel_of
from hooklens.results.account import RunAccount
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import drops_out, not_finite, why_plain
from hooklens.sweeps.protocol import Item, Patches, Sweep
from hooklens.sweeps.resume import Part, Progressed, Resume, key_of, products_of, sketch_of
from hooklens.sweeps.settings import current
from hooklens.sweeps.verification import verify


@dataclass(frozen=True, eq=False)
class Outcome(RunAccount):
    """The metric of every patch and pair, and how it was computed."""

    values: Float[Tensor, "patch pair"]
    base: Float[Tensor, "pair"]
    other: Float[Tensor, "pair"] | None = None  # the metric of the run that gave the values, where one was asked for


def execute(
    patches: Sweep,
    metric: Any,
    *,
    file: Resume | None = None,
    other: Float[Tensor, "pair pos d_model"] | None = None,
) -> Outcome:
    """The metric of every patch, equal to that of one hooked forward pass per patch.

    `other` is the stream that leaves the last block of another run, whose metric is wanted beside the base run's.
    """
    with products_of(file):
        reason = why_plain(patches.model, steps=patches.steps)
        (reader,), values, kept = begun([patches], [metric], file, whole=reason is not None)
        outcome = run(patches, reader, values, kept=Part(kept), reason=reason)
        if other is None:
            return outcome
        return replace(outcome, other=Reader(patches.model, metric, other, whole=reader.whole).base)


def begun(
    sweeps: Sequence[Sweep], metrics: Sequence[Any], file: Resume | None, *, whole: bool
) -> tuple[list[Reader], Float[Tensor, "patch pair"], Progressed | None]:
    """The readers of sweeps of as many patches, their values side by side as far as they are known, and their file."""
    model, asked = sweeps[0].model, [sweep.asked() for sweep in sweeps]
    key = ""
    if file is not None:  # before the metric is called for the first time, which may change what it refers to
        parts = {name: part for _, parts in asked for name, part in parts.items()}
        metric = metrics[0] if len(metrics) == 1 else tuple(metrics)
        key = key_of(model, ([grid for grid, _ in asked], parts), metric, file)
    readers = [Reader(model, metric, sweep.stream, whole=whole) for sweep, metric in zip(sweeps, metrics, strict=True)]
    base = torch.cat([reader.base for reader in readers])
    values = base.repeat(len(sweeps[0]), 1)
    if file is None:
        return readers, values, None
    sketch = sketch_of(base, [part for sweep in sweeps for part in sweep.sketch()])
    return readers, values, Progressed(file, key, sketch, values, kernel_of(model))


def run_parts(
    parts: Iterable[tuple[Patches, Reader]],
    values: Float[Tensor, "patch pair"],
    *,
    kept: Progressed | None,
    reason: str | None = None,
    advance: Advance,
) -> list[Outcome]:
    """Run sweeps of some pairs each, whose values stand side by side; the bar counts patches of single pairs."""
    outcomes, first = [], 0
    for patches, reader in parts:
        pairs = slice(first, first + reader.n_pairs)
        part = Part(kept, pairs)
        values[[*{*range(len(patches))} - part.finished()], pairs] = reader.base
        outcomes.append(run(patches, reader, values[:, pairs], kept=part, reason=reason, advance=advance))
        first = pairs.stop
    return outcomes


def run(
    patches: Patches,
    reader: Reader,
    values: Float[Tensor, "patch pair"],
    *,
    kept: Part,
    reason: str | None = None,
    advance: Advance | None = None,
) -> Outcome:
    """Fill in the values, which begin as the base run's, and check them; `reason` says why the plain loop must do it.

    `advance` moves a bar that is there already, by one for each patch of one pair.
    """
    if current().plain:
        reason = reason or "asked for"
    if reason is None:
        items = patches.live(reader)
        live, computed, how = {item.patch for item in items}, patches.share(reader, items), "engine"
    else:
        items = [Item(number, 0, 0) for number in patches.loop()]
        live, computed, how = set(), 1.0, f"plain loop: {reason}"
    resumed = kept.finished() & {item.patch for item in items}
    if reason is not None and drops_out(patches.model):
        resumed = set()  # no two passes with dropout agree
    _run_bins(patches, reader, items=items, values=values, kept=kept, plain=reason is not None, advance=advance)
    if (fault := not_finite(values, reader.base)) is not None:
        raise InputError(patches.fault(fault, values))
    error, n = float("nan"), 0
    if reason is None or resumed:
        error, n = verify(patches, reader, live, values, resumed=resumed, file=kept.path)
    return Outcome(
        values=values,
        base=reader.base,
        computed=computed,
        largest_error=error,
        n_verified=n,
        how=how,
        kernel=kernel_of(patches.model),
    )


def _run_bins(
    patches: Patches,
    reader: Reader,
    *,
    items: list[Item],
    values: Tensor,
    kept: Part,
    plain: bool,
    advance: Advance | None,
) -> None:
    """The values of all items, a bin at a time; a patch at a time by plain hooked passes."""
    rows = patches.rows_at_once(current().memory)
    # All bins are made before finished ones are left out, so that the rest runs in the same batches as ever.
    bins = [[item] for item in items] if plain else make_bins(patches, items, rows)
    finished = kept.finished()
    bins = [some for some in bins if not finished.issuperset(item.patch for item in some)]
    n_todo = len({item.patch for some in bins for item in some})
    if advance is None:
        bar: Any = progress(patches.title, n_todo, unit=patches.unit)
    else:  # a bar that is there already moves on by those that need no run
        n_pairs, moved = values.shape[1], advance
        moved((len(patches) - n_todo) * n_pairs)
        bar = nullcontext(lambda amount=1: moved(amount * n_pairs))
    with bar as move:
        for some in bins:
            numbers = {item.patch for item in some}
            with within(move, len(numbers), patches.rows_of_layers(some)):
                if plain:
                    values[some[0].patch] = patches.plain([some[0].patch], reader)[0]
                else:
                    _run_bin(patches, reader, some, values, rows)
            kept.save(numbers)


def make_bins(patches: Patches, items: Iterable[Item], rows: int) -> list[list[Item]]:
    """Items in bins of about `rows` token rows. A bin holds whole patches, near in position and then in layer."""
    n_pos = patches.tokens.shape[1]
    by_patch: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        by_patch[item.patch].append(item)
    order = sorted(by_patch, key=lambda i: (min(x.start for x in by_patch[i]), patches.layer_of(i), i))
    weights = {number: sum(n_pos - item.start for item in some) for number, some in by_patch.items()}
    total = sum(weights.values())
    size = total / max(1, -(-total // rows))  # balanced: no small bin is left over
    bins: list[list[Item]] = [[]]
    filled = 0
    for number in order:
        if bins[-1] and filled + weights[number] / 2 > size:
            bins.append([])
            filled = 0
        bins[-1] += by_patch[number]
        filled += weights[number]
    return [some for some in bins if some]


def _run_bin(patches: Patches, reader: Reader, items: list[Item], values: Tensor, rows: int) -> None:
    """Values of a bin's patches; one patch with more rows than fit is pushed through in pieces."""
    n_pos, filled = patches.tokens.shape[1], 0
    pieces: list[list[Item]] = [[]]
    for item in items:
        if pieces[-1] and filled > 1.5 * rows and not patches.together:
            pieces.append([])
            filled = 0
        pieces[-1].append(item)
        filled += n_pos - item.start
    finals = [x for piece in pieces for x in patches.walk(reader, piece)]
    patch, pair, start = torch.tensor([(x.patch, x.pair, x.start) for x in items], device=values.device).unbind(1)
    if reader.rowwise():
        values[patch, pair] = reader.values_of_rows(torch.stack(finals), pair, start)
        return
    for number in patch.unique().tolist():
        own = (patch == number).nonzero().flatten()
        values[number] = reader.values_of_patch([finals[i] for i in own.tolist()], pair[own], start[own])
