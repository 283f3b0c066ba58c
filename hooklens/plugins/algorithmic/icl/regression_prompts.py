"""Prompts of in-context regression as tensors: points, answers, a query, and its target."""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.errors import InputError, WrongType
from hooklens.data.batches import Batch
from hooklens.data.regression import InContextRegression, in_context_regression
from hooklens.model.config import VectorEmbed
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.plugins.algorithmic.icl.input_moments import need_task
from hooklens.plugins.algorithmic.task_of_run import trained_task
from hooklens.training.training_run import Run

Points = Float[Tensor, "task point d"]
Answers = Float[Tensor, "task point"]
Queries = Float[Tensor, "task d"]
PerTask = Float[Tensor, "task"]


@dataclass(frozen=True, eq=False)
class RegressionPrompts:
    """Tasks with `n_points` examples each, the point at which the answer is asked for, and the answer.

    >>> import hooklens as hl
    >>> prompts = prompts_of(hl.data.in_context_regression(d=2, n_points=3).batch(0, 4))
    >>> prompts.points.shape, prompts.query.shape, prompts.tokens().shape
    (torch.Size([4, 3, 2]), torch.Size([4, 2]), torch.Size([4, 4, 3]))
    """

    points: Points
    answers: Answers
    query: Queries
    target: PerTask
    interleaved: bool = False

    def __post_init__(self) -> None:
        need_examples(self.points, answers=self.answers, query=self.query, target=self.target)

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        how = "x and y in tokens of their own" if self.interleaved else "a token for each example"
        return f"RegressionPrompts({len(self)} prompts of {self.n_points} examples in {self.d} dimensions, {how})"

    @property
    def n_points(self) -> int:
        """The number of examples in each prompt."""
        return self.points.shape[1]

    @property
    def d(self) -> int:
        """The number of coordinates of a point."""
        return self.points.shape[2]

    def tokens(self) -> Float[Tensor, "task pos d_in"]:
        """What a model reads: (x, y) a token and (query, 0) last, or x and y in tokens of their own.

        The tokens equal those of the batch that the prompts were read from. Gradients flow to the query.
        """
        xs = torch.cat([self.points, self.query[:, None]], 1)
        ys = torch.cat([self.answers, torch.zeros_like(self.target)[:, None]], 1)[..., None]
        if not self.interleaved:
            return torch.cat([xs, ys], -1)
        both = torch.stack([torch.cat([xs, 0 * ys], -1), torch.cat([0 * xs, ys], -1)], 2)
        return both.flatten(1, 2)[:, :-1]

    def to(self, other: Tensor) -> "RegressionPrompts":
        """The prompts on the device and in the dtype of a tensor."""
        parts = {name: getattr(self, name).to(other) for name in ("points", "answers", "query", "target")}
        return replace(self, **parts)


def need_examples(points: Any, **others: Any) -> None:
    """Raise unless these are points, answers, a query and a target (or some of them) of the same tasks.

    >>> need_examples(torch.ones(5, 4, 3), answers=torch.ones(5, 2))
    Traceback (most recent call last):
    hooklens.core.errors.InputError: points of shape [5, 4, 3] need answers [5, 4]; got [5, 2]
    """
    if not isinstance(points, Tensor) or points.ndim != 3:
        seen = list(points.shape) if isinstance(points, Tensor) else f"{points!r:.60}"
        raise InputError(f"points are a tensor [task point d], one task with points[None]; got {seen}")
    parts = {"points": points, **others}
    if not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts.values()):
        raise InputError(f"{', '.join(parts)} are tensors of real numbers with a point")
    if len({part.dtype for part in parts.values()}) > 1:
        seen = ", ".join(f"{name} {part.dtype}" for name, part in parts.items())
        raise InputError(f"the parts of a prompt have one dtype, got {seen}; convert them with .to(dtype)")
    if not all(bool(part.detach().isfinite().all()) for part in parts.values()):
        raise InputError("some numbers of these prompts are not finite")
    tasks, n, d = points.shape
    if not points.numel():
        raise InputError(
            f"prompts have at least one task, at least one example and one coordinate, got {[tasks, n, d]}"
        )
    shapes = {"answers": [tasks, n], "query": [tasks, d], "target": [tasks]}
    if any(list(part.shape) != shapes[name] for name, part in others.items()):
        wanted = ", ".join(f"{name} {shapes[name]}" for name in others)
        seen = ", ".join(str(list(part.shape)) for part in others.values())
        raise InputError(f"points of shape {[tasks, n, d]} need {wanted}; got {seen}")


def prompts_of(batch: Batch) -> RegressionPrompts:
    """Read the prompts of a batch of `hl.data.in_context_regression`, interleaved or not.

    Of an interleaved batch the last point is the query.
    """
    if not isinstance(batch, Batch):
        raise WrongType(f"a batch is that of hl.data.in_context_regression(...).batch(step, size), got {batch!r:.60}")
    inputs, targets = batch.inputs, batch.targets[..., 0]
    if inputs.ndim != 3 or inputs.shape[-1] < 2:
        raise InputError(f"a batch of in-context regression holds vectors [task pos d + 1], got {list(inputs.shape)}")
    interleaved = bool(batch.counts[0, 0]) and inputs.shape[1] > 1
    x, y = inputs[..., :-1], inputs[..., -1]
    if interleaved:
        x, y = x[:, ::2], y[:, 1::2]
    return RegressionPrompts(x[:, :-1], y[:, : x.shape[1] - 1], x[:, -1], targets[:, -1], interleaved)


def trained_lengths(data: InContextRegression) -> tuple[int, int]:
    """The least and the largest number of examples of a task, whose `n_points` is a number or such a pair."""
    return (data.n_points, data.n_points) if isinstance(data.n_points, int) else data.n_points


def asked_length(data: InContextRegression, n_points: int | None) -> int:
    """The number of examples asked for, or the task's own if it has just one."""
    need_task(data)
    least, most = trained_lengths(data)
    if n_points is None and least != most:
        raise InputError(f"the task has {least} to {most} examples; say how many with n_points=")
    return most if n_points is None else whole("n_points", n_points, 1)


def draw_prompts(
    data: InContextRegression, tasks: int, *, n_points: int | None = None, seed: int = 0
) -> RegressionPrompts:
    """New prompts of a task, of `n_points` examples, which no training step has drawn.

    >>> import hooklens as hl
    >>> draw_prompts(hl.data.in_context_regression(d=2, n_points=3), 5).answers.shape
    torch.Size([5, 3])
    """
    fixed = replace(data, n_points=asked_length(data, n_points))
    x, y, _ = fixed.draw(whole("tasks", tasks, 1), seeded(seed))
    return RegressionPrompts(x[:, :-1], y[:, :-1], x[:, -1], y[:, -1], data.interleaved)


def task_of(run: Run | str | os.PathLike) -> InContextRegression:
    """The task that a run was trained on; refused if that is not in-context regression."""
    return trained_task(run, "in-context regression", in_context_regression)


def predict(model: HookedTransformer, prompts: RegressionPrompts) -> PerTask:
    """The model's answers at the queries, its output at the last position.

    >>> from hooklens.testing import tiny_model
    >>> import hooklens as hl
    >>> model = tiny_model(embed=VectorEmbed(d_in=3), d_vocab_out=1)
    >>> predict(model, draw_prompts(hl.data.in_context_regression(d=2, n_points=3), 5)).shape
    torch.Size([5])
    """
    need_regression(model, prompts)
    answers = model(prompts.to(model.W_U).tokens())[:, -1, 0]
    if not bool(answers.detach().isfinite().all()):
        raise InputError("some answers of the model are not finite; use a checkpoint from before training diverged")
    return answers


def widened_prompts(model: HookedTransformer, prompts: RegressionPrompts) -> RegressionPrompts:
    """The prompts on the model's device, in its dtype or float32 if that is wider: least squares needs digits."""
    wide = torch.promote_types(model.dtype, torch.float32)
    return prompts.to(torch.zeros((), dtype=wide, device=model.device))


def need_prompts(prompts: Any) -> None:
    """Raise for anything except prompts of regression."""
    if not isinstance(prompts, RegressionPrompts):
        raise WrongType(f"prompts are those of draw_prompts(data, tasks) or prompts_of(batch), got {prompts!r:.60}")


def need_regression(model: HookedTransformer, prompts: RegressionPrompts) -> None:
    """Raise unless the model reads these prompts and answers with one number."""
    need_hooked(model, "in-context regression")
    need_prompts(prompts)
    cfg, wanted = model.cfg, prompts.d + 1
    if not isinstance(cfg.embed, VectorEmbed) or cfg.embed.d_in != wanted or cfg.d_vocab_out != 1:
        reads = f"vectors of {cfg.embed.d_in}" if isinstance(cfg.embed, VectorEmbed) else "tokens"
        raise InputError(
            f"prompts of {prompts.d} coordinates need a model with embed=VectorEmbed(d_in={wanted}) and d_vocab_out=1; "
            f"this one reads {reads} and gives {cfg.d_vocab_out} outputs"
        )
    length = 2 * prompts.n_points + 1 if prompts.interleaved else prompts.n_points + 1
    if length > cfg.n_ctx:
        raise InputError(
            f"{prompts.n_points} examples and a query are {length} tokens, and the model's n_ctx is {cfg.n_ctx}; give "
            "fewer examples"
        )
