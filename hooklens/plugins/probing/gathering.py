"""Gather activations at chosen sites and positions of many prompts, in batches, into memory or onto disk."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hooklens.core.arguments import path_of, whole
from hooklens.core.errors import InputError, WrongType
from hooklens.core.fingerprint import identity
from hooklens.core.hooks import edited_elsewhere
from hooklens.core.names import Where, axes, parse, resolve
from hooklens.core.progress_bar import progress
from hooklens.data.prompts import Prompts, row_key, rows_of
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.probing.scoring import as_rows
from hooklens.plugins.probing.store import Files, Memory, temporary_folder
from hooklens.plugins.probing.task import PerPrompt, ProbeTask, checked_task, components, positions_of
from hooklens.results.result import Result, Table

_AT_ONCE = 2**28  # maximum bytes of activations per batch before positions are selected
_MOST_TOKENS = 8192
_POSITIONS = ("pos", "query_pos")


@dataclass(frozen=True, eq=False)
class Activations(Result):
    """The activations of each point at each example's position; head and other axes are flattened into one.

    `embed` is the example's token embedding as it enters the stream, without its position. `context` is its mean over
    the prompt up to that position: the information available before the model computes anything. Where a model reads
    vectors, `token` numbers them. On disk `x` is
    memory-mapped: read one point at a time.
    """

    x: Float[Tensor, "point example d"]
    points: list[str]
    token: Int[Tensor, "example"]
    prompt: Int[Tensor, "example"]
    pos: Int[Tensor, "example"]
    group: Int[Tensor, "example"]
    embed: Float[Tensor, "example d_model"]
    context: Float[Tensor, "example d_model"]

    def __len__(self) -> int:
        return self.x.shape[1]

    def at(self, point: str | int) -> Float[Tensor, "example d"]:
        """The rows of one point, by full name, or by layer if exactly one point has this layer."""
        matches = [i for i, name in enumerate(self.points) if point in (name, getattr(parse(name), "layer", None))]
        if len(matches) != 1:
            raise InputError(f"{point!r} names {len(matches)} of the points {', '.join(self.points)}; give a full name")
        return self.x[matches[0]]

    def table(self, n: int | None = None) -> Table:
        """One row per point: the mean norm of its vectors, and their mean distance from the mean."""
        rows = []
        for name, x in zip(self.points[:n], self.x, strict=False):
            rows.append((name, x.shape[1], x.norm(dim=1).mean(), (x - x.mean(0)).norm(dim=1).mean()))
        return Table(("point", "width", "mean norm", "mean distance from mean"), rows)

    def figure(self) -> Any:
        """The mean norm at each point, and the mean distance from the mean."""
        from hooklens.viz.curves import lines

        rows = self.table().rows
        shown = {name: torch.tensor([row[i] for row in rows]) for i, name in ((2, "norm"), (3, "distance from mean"))}
        return lines(shown, title="Gathered activations", x_title="point", y_title="mean over examples")


def gather(
    model: HookedTransformer,
    prompts: ProbeTask | Prompts,
    *,
    site: Where = "resid_post",
    pos: int | PerPrompt | None = -1,
    folder: str | Path | None = None,
    memory: int = 2**30,
    average: bool = False,
) -> Activations:
    """Collect the activations of a site at one position of each prompt, or at the positions of a task.

    >>> from hooklens.testing import tiny_model
    >>> acts = gather(tiny_model(), [[1, 2, 3], [4, 5]], site="resid_post")
    >>> acts.x.shape, acts.token.tolist()                 # point example d; the last token of each prompt
    (torch.Size([2, 2, 8]), [3, 5])
    >>> gather(tiny_model(), [[1, 2, 3], [4, 5]], site=("z", 1), pos=None).prompt.tolist()       # every position
    [0, 0, 0, 1, 1]

    Prompts run in batches of similar length, only as far as the last point needs, and only the chosen positions are
    kept. With `folder`, activations go to memory-mapped files in it, and an interrupted run can be continued (not while
    hooks are active, because the files would outlive them). Without `folder`, they stay in memory up to `memory` bytes
    and go to unnamed temporary files beyond that. `average` gives the mean over all positions up to the chosen one.
    """
    folder = None if folder is None else path_of(folder, "folder")
    if folder is not None and _hooked(model):
        raise InputError(
            f"folder={str(folder)!r} stores activations of the unedited model, but hooks are active on it now (steer, "
            "ablate, hooks, ...), and the folder could not tell them apart; gather without folder, or without hooks"
        )
    rows, prompt, at, group = _examples(model, prompts, pos)
    points = resolve(site, model.hook_names())
    width = _width(model, points, min(rows, key=len))
    batches = _batches([len(row) for row in rows], _tokens_at_once(model, points))
    examples = [torch.isin(prompt, torch.tensor(batch)).nonzero().flatten() for batch in batches]
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    shapes: dict[str, tuple[int, ...]] = {"x": (len(points), len(prompt), width)}
    shapes |= dict.fromkeys(("embed", "context"), (len(prompt), model.cfg.d_model))
    with ExitStack() as stack:
        store: Memory | Files
        if folder is None and sum(map(math.prod, shapes.values())) * dtype.itemsize <= whole("memory", memory):
            store = Memory(shapes, dtype)
        else:
            parts = (model.cfg.to_json(), dict(model.state_dict()), (rows, prompt, at, points, batches, average))
            key = "unnamed" if folder is None else identity(parts, "the gathered activations")
            folder = stack.enter_context(temporary_folder()) if folder is None else folder
            store = Files(folder, shapes, dtype, key, [index.tolist() for index in examples])
        with torch.no_grad(), packed_linears(rows=1024), progress("gathering", len(batches), unit="batches") as advance:
            advance(store.done)
            for batch, index in list(zip(batches, examples, strict=True))[store.done :]:
                place = {number: i for i, number in enumerate(batch)}
                row = torch.tensor([place[number] for number in prompt[index].tolist()])
                store.write(index, _values(model, [rows[i] for i in batch], points, (row, at[index]), average=average))
                advance()
        arrays = store.finish()
    return Activations(
        x=arrays["x"],
        points=points,
        token=_tokens_read([rows[i][p] for i, p in zip(prompt.tolist(), at.tolist(), strict=True)]),
        prompt=prompt,
        pos=at,
        group=group,
        embed=arrays["embed"],
        context=arrays["context"],
    )


def task_rows(
    model: HookedTransformer, tasks: Sequence[ProbeTask], site: Where
) -> tuple[str, torch.dtype, list[np.ndarray]]:
    """The full name of one point, the dtype of its activations, and the rows of each task, which has two classes.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.plugins.probing.labels import odd_first
    >>> point, dtype, rows = task_rows(model := tiny_model(), [odd_first(model)], ("resid_post", 0))
    >>> point, rows[0].shape
    ('blocks.0.hook_resid_post', (40, 8))
    """
    if not isinstance(tasks, Sequence) or not tasks:
        raise WrongType(f"tasks is a list of at least one ProbeTask, got {tasks!r:.60}")
    for task in map(checked_task, tasks):
        if len(task.classes) != 2 or len(task.label.unique()) != 2:
            raise InputError(f"a direction needs examples of two classes, {task.name!r} has {task.classes}; choose two")
    gathered = [gather(model, task, site=site) for task in tasks]
    points = gathered[0].points
    if len(points) != 1:
        raise InputError(f"directions are compared at a single point, got {', '.join(points)}; give ('name', layer)")
    return points[0], gathered[0].x.dtype, [as_rows(acts.x[0]) for acts in gathered]


def _examples(
    model: HookedTransformer, prompts: ProbeTask | Prompts, pos: int | PerPrompt | None
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Token rows, and the prompt, position and group of every example."""
    if isinstance(prompts, ProbeTask):
        return prompts.tokens, prompts.prompt, prompts.pos, prompts.group
    rows = [row.cpu() for row in rows_of(model, prompts, "prompts")]
    places = [range(len(row)) for row in rows] if pos is None else [[place] for place in positions_of(rows, pos)]
    prompt = torch.tensor([i for i, chosen in enumerate(places) for _ in chosen])
    same = components([[row_key(rows[i])] for i in prompt.tolist()])
    return rows, prompt, torch.tensor([place for chosen in places for place in chosen]), same


def _tokens_read(read: list[Tensor]) -> Int[Tensor, "example"]:
    """The token that each example reads; vectors are numbered, equal ones alike."""
    tokens = torch.stack(read)
    return tokens if tokens.ndim == 1 else tokens.unique(dim=0, return_inverse=True)[1]


def _tokens_at_once(model: HookedTransformer, points: list[str]) -> int:
    cfg = model.cfg
    widest = max(cfg.d_model, cfg.d_mlp or 0, cfg.n_heads * cfg.d_head)
    widest = max(widest, cfg.d_vocab_out if any(_stop(point) is None for point in points) else 0)
    return max(1, min(_MOST_TOKENS, _AT_ONCE // (4 * widest * (len(points) + 1))))


def _batches(lengths: list[int], tokens: int) -> list[list[int]]:
    """Batches of prompts, from the longest to the shortest, with at most the given number of padded tokens per batch.

    >>> _batches([2, 5, 3, 3], 6)
    [[1], [2, 3], [0]]
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _stop(point: str) -> int | None:
    """The layer at which a forward pass can stop after the point has fired; None for the end."""
    site = parse(point)
    if site is not None and site.layer is not None:
        return site.layer + 1
    return 0 if point in ("hook_embed", "hook_pos_embed") else None


def _run(model: HookedTransformer, rows: list[Tensor], points: list[str]) -> Any:
    """The values of the points and of the embedding for a batch, padded on the right."""
    lengths, tokens = torch.tensor([len(row) for row in rows]), pad_sequence(rows, batch_first=True)
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    stops = [_stop(point) for point in points]
    last = None if None in stops else max(stop for stop in stops if stop is not None)
    mask = None if bool(real.all()) else real.to(model.device)
    names = list(dict.fromkeys([*points, "hook_embed"]))
    _, cache = model.run_with_cache(tokens.to(model.device), names, stop_at_layer=last, attention_mask=mask)
    return cache


def _width(model: HookedTransformer, points: list[str], row: Tensor) -> int:
    """The vector size of a point at one position, from a run on one prompt; all points must have the same size."""
    if not points:
        raise InputError("the site selects no point to gather; give one such as 'resid_post'")
    for point in points:
        names = axes(point)
        if not any(name in names for name in (*_POSITIONS, "key_pos")) or {"query_pos", "key_pos"} <= set(names):
            raise InputError(
                f"{point} has the axes {', '.join(names)}, not one vector per position of the same size in every "
                "prompt; probe resid_pre/mid/post, attn_out, mlp_out, z, q, k, v, post, ..."
            )
    with torch.no_grad():
        cache = _run(model, [row], points)
    widths = {point: cache[point][:, 0].numel() if cache[point].ndim > 2 else 1 for point in points}
    if len(set(widths.values())) != 1:
        raise InputError(f"points gathered together need vectors of one size, got {widths}; gather each separately")
    return next(iter(widths.values()))


def _values(
    model: HookedTransformer, rows: list[Tensor], points: list[str], at: tuple[Tensor, Tensor], *, average: bool
) -> dict[str, Tensor]:
    """The vectors that a store keeps of one batch, at these rows and positions."""
    cache = _run(model, rows, points)
    dtype = torch.promote_types(model.dtype, torch.float32)
    embed, acts = cache["hook_embed"].to(dtype), (cache[point].flatten(2) for point in points)
    x = [_running_mean(act.to(dtype))[at] if average else act[at].to(dtype) for act in acts]
    return {"embed": embed[at].cpu(), "context": _running_mean(embed)[at].cpu(), "x": torch.stack(x).cpu()}


def _running_mean(x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]


def _hooked(model: HookedTransformer) -> bool:
    """Whether any hook is active that could edit activations."""
    torch_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return torch_hooks or edited_elsewhere(model.hook_points().values())
