"""A model and learners on prompts unlike those of training: scaled inputs, longer prompts, other dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import real, seeded, whole, zero_or_more
from hooklens.core.errors import InputError
from hooklens.data.regression import InContextRegression, in_context_regression
from hooklens.model.config import Learned, VectorEmbed
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.icl.best_steps import best_step
from hooklens.plugins.algorithmic.icl.input_moments import moments_of, need_task
from hooklens.plugins.algorithmic.icl.learners import Learner, LeastSquares, need_learners
from hooklens.plugins.algorithmic.icl.regression_prompts import (
    RegressionPrompts,
    need_regression,
    predict,
    trained_lengths,
    widened_prompts,
)
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table

PerShift = Float[Tensor, "shift"]
_TASKS = 512  # prompts of each shift


@dataclass(frozen=True, eq=False)
class ShiftErrors(Result):
    """Mean squared errors on shifted prompts, divided by that of the answer 0 there (`zero`).

    No answer that is computed from what the model is shown has an expected error below `unavoidable`. With few examples
    the least possible error lies above it.
    """

    terms = {
        "unavoidable": "the error left by the noise of the target and by coordinates that are not shown",
        "shown": "what the model is asked, and what it was not trained on",
    }

    shifts: list[str]
    notes: list[str]
    learners: list[str]
    model_errors: PerShift
    learner_errors: Float[Tensor, "learner shift"]
    unavoidable: PerShift
    zero: PerShift

    def table(self, n: int | None = None) -> Table:
        """One row a shift."""
        columns = ("shift", "model", *self.learners, "unavoidable", "shown")
        parts = [part.tolist() for part in (self.model_errors, *self.learner_errors, self.unavoidable)]
        return Table(columns, list(zip(self.shifts, *parts, self.notes, strict=True))).head(n)

    def figure(self) -> Any:
        """Errors by shift."""
        from hooklens.viz.figures import heatmap

        rows = torch.cat([self.model_errors[None], self.learner_errors])
        labels = ["model", *self.learners]
        return heatmap(rows, x=self.shifts, y=labels, diverging=False, colourbar="error / that of 0")


def measure_shifts(
    model: HookedTransformer,
    data: InContextRegression,
    learners: Learner | Sequence[Learner],
    *,
    scales: float | Sequence[float] = (0.5, 1.0, 2.0),
    lengths: int | Sequence[int] = (),
    dims: int | Sequence[int] = (),
    tasks: int = _TASKS,
    seed: int = 0,
) -> ShiftErrors:
    """Does the model still do what a learner does on inputs that training did not show? `data` is the training task.

    `scales` multiply the points, the query among them; answers follow, and noise does not. `lengths` are numbers of
    examples; the other shifts have the largest number of training. `dims` are numbers of coordinates of the task. The
    model reads `data.d` of a point, so it can be shown fewer, the rest 0, or the first `data.d` of more. What the
    coordinates that are not shown add to every answer is noise to the model and to the learners: no model can be asked
    about more coordinates than it reads.

    >>> from hooklens.plugins.algorithmic.icl.constructions import construct_descent
    >>> from hooklens.plugins.algorithmic.icl.learners import GradientDescent
    >>> data, step = in_context_regression(d=2, n_points=5), GradientDescent(4.0)
    >>> errors = measure_shifts(construct_descent(step, 2, 5), data, [step], dims=(1, 4))
    >>> errors.shifts
    ['scale 0.5', 'scale 1', 'scale 2', '1 dimension', '4 dimensions']
    >>> torch.allclose(errors.model_errors, errors.learner_errors[0], atol=1e-5)
    True

    Reference: von Oswald et al. (2023), section 3, "Out-of-distribution validation tasks", and appendix A.2 (scales);
    Garg et al. (2022), section 4 (inputs of other scales, in a subspace, skewed, and others). Longer prompts are ours.
    """
    need_task(data)
    asked = need_learners(learners)
    shifts = _shifts(data, scales, lengths, dims)
    most = trained_lengths(data)[1]
    longest = max(trained_lengths(shift.task)[1] for shift in shifts)
    need_regression(model, _Shift("", "", replace(data, n_points=longest)).draw(data.d, 1, seed))
    whole_tasks = whole("tasks", tasks, 1)
    by_shift = torch.stack([_errors(model, asked, shift.draw(data.d, whole_tasks, seed)) for shift in shifts], 1)
    zero = by_shift[-1]
    untrained = "; positions without training" * isinstance(model.cfg.positional_embedding_type, Learned)
    notes = [shift.note + untrained * (trained_lengths(shift.task)[1] > most) for shift in shifts]
    hidden = torch.tensor([shift.hidden(data.d) for shift in shifts]).to(zero)
    return ShiftErrors(
        shifts=[shift.name for shift in shifts],
        notes=notes,
        learners=[learner.title for learner in asked],
        model_errors=by_shift[0] / zero,
        learner_errors=by_shift[1:-1] / zero,
        unavoidable=(data.noise**2 + hidden) / zero,
        zero=zero,
    )


@dataclass(frozen=True)
class _Shift:
    """A task whose points are multiplied by `scale`, and what that means to the model."""

    name: str
    note: str
    task: InContextRegression
    scale: float = 1.0

    def draw(self, width: int, tasks: int, seed: int) -> RegressionPrompts:
        """Prompts shown in `width` coordinates: the first ones, or all of them and zeros."""
        x, y, w = self.task.draw(tasks, seeded(seed))
        y = y + (self.scale - 1) * (x * w[:, None]).sum(-1)
        shown = torch.nn.functional.pad(self.scale * x[..., :width], (0, max(width - self.task.d, 0)))
        return RegressionPrompts(shown[:, :-1], y[:, :-1], shown[:, -1], y[:, -1], self.task.interleaved)

    def hidden(self, width: int) -> float:
        """The variance of answers due to coordinates that are not shown."""
        return float(moments_of(self.task).covariance[0, 0]) * max(self.task.d - width, 0)


def _shifts(
    data: InContextRegression,
    scales: float | Sequence[float],
    lengths: int | Sequence[int],
    dims: int | Sequence[int],
) -> list[_Shift]:
    (least, most), shifts = trained_lengths(data), list[_Shift]()
    data = replace(data, n_points=most)
    for scale in zero_or_more("scales", scales):
        if real("scales", scale) == 0:
            raise InputError("points times 0 say nothing of the weights; give scales other than 0")
        note = "as in training" if scale == 1 else f"points times {scale:g}"
        shifts.append(_Shift(f"scale {scale:g}", note, data, scale))
    for length in zero_or_more("lengths", lengths):
        side = (whole("lengths", length, 1) > most) - (length < least)
        note = {1: "longer than training", 0: "a length of training", -1: "shorter than training"}[side]
        shifts.append(_Shift(f"{length} examples", note, replace(data, n_points=length)))
    for d in zero_or_more("dims", dims):
        more = whole("dims", d, 1) > data.d
        note = f"the first {data.d} of {d} coordinates" if more else f"{d} of {data.d} coordinates, the rest 0"
        shifts.append(_Shift(f"{d} dimension{'s' * (d > 1)}", note, replace(data, d=d)))
    if not shifts:
        raise InputError("measure_shifts needs at least one of scales, lengths and dims")
    return shifts


def _errors(
    model: HookedTransformer, learners: Sequence[Learner], prompts: RegressionPrompts
) -> Float[Tensor, "answerer"]:
    """Mean squared errors: the model's, the learners', and that of 0."""
    prompts = widened_prompts(model, prompts)
    with torch.no_grad():
        answers = [predict(model, prompts).to(prompts.target), *(learner.predict(prompts) for learner in learners)]
        return torch.stack([*answers, torch.zeros_like(prompts.target)]).sub(prompts.target).square().mean(1)


def demo(model: HookedTransformer) -> ShiftErrors | Needs:
    """Prompts of 3 and 4 points, if the model reads vectors and answers with one number."""
    embed = model.cfg.embed
    if not isinstance(embed, VectorEmbed) or embed.d_in < 2 or model.cfg.d_vocab_out != 1 or model.cfg.n_ctx < 5:
        return Needs("vectors (x, y) as input and one output")
    data = in_context_regression(d=embed.d_in - 1, n_points=3)
    step = best_step(moments_of(data), 3).learner()
    return measure_shifts(model, data, [step, LeastSquares()], lengths=(4,), dims=(1, embed.d_in), tasks=16)
