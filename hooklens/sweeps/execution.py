"""Run a sweep: only the rows that can change, only the layers above, many patches in one matrix."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.progress_bar import Advance, progress, within
from hooklens.model.linear import kernel_of
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import drops_out, not_finite, why_plain
from hooklens.sweeps.protocol import Item, Patches, Sweep
from hooklens.sweeps.resume import Part, Progressed, Resume, key_of, products_of, sketch_of
from hooklens.sweeps.settings import current
from hooklens.sweeps.verification import verify


@dataclass(frozen=True, eq=False)
class Outcome:
    """The metric of every patch and pair, and how it was computed."""

    values: Float[Tensor, "patch pair"]
    base: Float[Tensor, "pair"]
    computed: float  # share of the plain loop's token-layers that were worked out
    largest_error: float  # between patches run both ways; NaN if none was
    n_verified: int
    how: str
    kernel: str  # "linear" or "packed": what linear layers multiplied with
    other: Float[Tensor, "pair"] | None = None  # the metric of the run that gave the values, where one was asked for


def execute(
    patches: Sweep,
    metric: Any,
    *,
    resume: str | Path | Resume | None = None,
    other: Float[Tensor, "pair pos d_model"] | None = None,
) -> Outcome:
    """The metric of every patch, exactly as a hooked forward pass a patch would give it.

    `other` is the stream that leaves the last block of another run, whose metric is wanted beside the base run's.
    """
    file = None if resume is None else Resume.of(resume)
    with products_of(file):
        reason = why_plain(patches.model, steps=patches.steps)
        # before the metric is called for the first time, which may change what it refers to
        key = "" if file is None else key_of(patches.model, patches.asked(), metric, file)
        reader = Reader(patches.model, metric, patches.stream, whole=reason is not None)
        values = reader.base.repeat(len(patches), 1)
        kept = None
        if file is not None:
            sketch = sketch_of(reader.base, patches.sketch())
            kept = Progressed(file.path, key, sketch, values, kernel_of(patches.model))
        outcome = run(patches, reader, values, kept=kept, reason=reason)
        if other is None:
            return outcome
        return replace(outcome, other=Reader(patches.model, metric, other, whole=reader.whole).base)


def run(
    patches: Patches,
    reader: Reader,
    values: Float[Tensor, "patch pair"],
    *,
    kept: Progressed | Part | None = None,
    reason: str | None = None,
    advance: Advance | None = None,
) -> Outcome:
    """Fill in the values, which begin as the base run's, and check them; `reason` says why the plain loop must do it.

    `advance` moves a bar that is there already.
    """
    resumed = set() if kept is None else kept.finished()
    if current().plain:
        reason = reason or "asked for"
    if reason is None:
        items = patches.live(reader)
        run_bins(patches, reader, items=items, values=values, kept=kept, advance=advance)
        worked, computed, how = {item.patch for item in items}, patches.share(reader, items), "engine"
        resumed &= worked
    else:
        _run_plain(patches, reader, values=values, kept=kept, advance=advance)
        worked, computed, how = set(), 1.0, f"plain loop: {reason}"
        resumed = set() if drops_out(patches.model) else resumed  # no two passes with dropout agree
    if (said := not_finite(values, reader.base)) is not None:
        raise InputError(patches.fault(said, values))
    error, n = float("nan"), 0
    if reason is None or resumed:
        error, n = verify(patches, reader, worked, values, resumed=resumed, file=kept and kept.path)
    return Outcome(
        values=values,
        base=reader.base,
        computed=computed,
        largest_error=error,
        n_verified=n,
        how=how,
        kernel=kernel_of(patches.model),
    )


def _run_plain(
    patches: Patches, reader: Reader, values: Tensor, kept: Progressed | Part | None, advance: Advance | None
) -> None:
    finished = set() if kept is None else kept.finished()
    todo = [number for number in patches.loop() if number not in finished]
    with _bar(patches, todo, advance) as move:
        for number in todo:
            values[number] = patches.plain([number], reader)[0]
            move()
            if kept is not None:
                kept.save([number])


def run_bins(
    patches: Patches,
    reader: Reader,
    items: list[Item],
    values: Tensor,
    kept: Progressed | Part | None,
    advance: Advance | None = None,
) -> None:
    """The values of all items, a bin at a time."""
    rows = patches.rows_at_once(current().memory)
    # Every bin is made, then those that are finished are left out: what is left runs in the company it would have had.
    finished = set() if kept is None else kept.finished()
    bins = [one for one in make_bins(patches, items, rows) if not finished.issuperset(item.patch for item in one)]
    todo = {item.patch for one in bins for item in one}
    with _bar(patches, todo, advance) as move:
        for one in bins:
            numbers = {item.patch for item in one}
            with within(move, len(numbers), patches.rows_of_layers(one)):
                _run_bin(patches, reader, one, values, rows)
            if kept is not None:
                kept.save(numbers)


def _bar(patches: Patches, todo: Any, advance: Advance | None) -> Any:
    """A bar of the patches to run; one that is there already moves on by those that need no run."""
    if advance is None:
        return progress(patches.title, len(todo), unit=patches.unit)
    advance(len(patches) - len(todo))
    return nullcontext(advance)


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
    return [one for one in bins if one]


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
    if reader.rowwise():
        pair = torch.tensor([item.pair for item in items], device=values.device)
        start = torch.tensor([item.start for item in items], device=values.device)
        found = reader.values_of_rows(torch.stack(finals), pair, start)
        values[[i.patch for i in items], [i.pair for i in items]] = found
        return
    by_patch: dict[int, list[tuple[int, int, Tensor]]] = defaultdict(list)
    for item, x in zip(items, finals, strict=True):
        by_patch[item.patch].append((item.pair, item.start, x))
    for patch, rows_of in by_patch.items():
        values[patch] = reader.values_of_patch(rows_of)
