"""Errors of trained models and of learners on the same fresh prompts, for each number of examples."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seed_number, several, whole
from hooklens.core.errors import InputError, WrongType
from hooklens.data.regression import InContextRegression
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.plugins.algorithmic.icl import (
    Averaging,
    BestStep,
    Learner,
    LeastSquares,
    RegressionPrompts,
    Ridge,
    Zero,
    best_gd_plus_plus,
    best_preconditioner,
    best_step,
    best_step_schedules,
    draw_prompts,
    moments_of,
    predict,
)
from hooklens.plugins.algorithmic.icl.input_moments import need_task
from hooklens.plugins.algorithmic.icl.learners import need_learner
from hooklens.results.result import Result, Table

OWN_STEP, SHARED_STEP, SHARED_MEAN = "best step at each length", "one step, summed", "one step, averaged"
LEAST_SQUARES = "least squares"
SCHEDULE, PLUS_PLUS = "6 steps, a rate each", "GD++, 6 steps"
ROUNDING = 1e-9  # a smaller share of the error of answering 0 is none
_LARGER = (1.15, 1.3)  # with the first alone, GD++ diverged on prompts of 5 examples
_RATE_LENGTHS = 8  # of the lengths, on which rates of several steps are searched; 2,000 data sets each take 20 seconds
_AT_ONCE = 2048  # prompts in one pass

ByLength = Float[Tensor, "model length"]


@dataclass(frozen=True, eq=False)
class ErrorsByLength(Result):
    """Mean squared errors of the answer at the query; all models and learners answer the same prompts.

    `excess` is how far a model's error lies above that of the best step at this length, as a share of the best step's
    exact error. It is a mean of differences on the same prompts, whose errors are mostly the same, so that its standard
    error is far smaller than that of the error itself. `above` and its standard errors are such differences, in units
    of the error, to the two steps that are the same for all lengths: that for sums over examples, and that for means.
    """

    baselines = ("zero", "tasks")

    lengths: Int[Tensor, "length"]
    tasks: int
    models: list[str]
    errors: ByLength
    standard_errors: ByLength
    excess: ByLength
    excess_errors: ByLength
    above: Float[Tensor, "step model length"]
    above_errors: Float[Tensor, "step model length"]
    learners: list[str]
    learner_errors: Float[Tensor, "learner length"]
    summed: BestStep
    averaged: BestStep
    zero: float

    def error_of(self, name: str) -> Float[Tensor, "length"]:
        """The errors of a model or a learner."""
        if name in self.models:
            return self.errors[self.models.index(name)]
        if name not in self.learners:
            raise InputError(f"no model or learner {name!r}; there are {', '.join([*self.models, *self.learners])}")
        return self.learner_errors[self.learners.index(name)]

    def mean_excess(self, model: str, of: BestStep) -> tuple[float, float]:
        """How far the model's mean error over all lengths is above that of a shared step, and its standard error.

        On the same prompts, both as shares of the exact mean error of that step: `summed` or `averaged`.
        """
        step, i, scale = int(of.mean), self.models.index(model), float(of.errors.mean())
        spread = self.above_errors[step, i].square().sum().sqrt() / len(self.lengths)
        return float(self.above[step, i].mean()) / scale, float(spread) / scale

    def table(self, n: int | None = None) -> Table:
        """One row a length: the models with their standard errors, then the learners."""
        columns = ["examples"]
        for model in self.models:
            columns += [model, f"{model}: standard error"]
        parts = torch.stack([self.errors, self.standard_errors], 1).flatten(0, 1)
        cells = torch.cat([parts, self.learner_errors]).T.tolist()
        rows = [(int(k), *row) for k, row in zip(self.lengths, cells, strict=True)]
        return Table([*columns, *self.learners], rows).head(n)

    def figure(self) -> Any:
        """Errors against the number of examples; of the learners those with exact errors, and least squares."""
        from hooklens.viz.curves import lines

        values = {model: self.error_of(model) for model in self.models}
        values |= {OWN_STEP: self.averaged.own_errors, SHARED_STEP: self.summed.errors}
        if LEAST_SQUARES in self.learners:
            least = self.error_of(LEAST_SQUARES)
            values[LEAST_SQUARES] = least.where(least > ROUNDING * self.zero, math.nan)
        bands = {
            model: (self.errors[i] - 2 * self.standard_errors[i], self.errors[i] + 2 * self.standard_errors[i])
            for i, model in enumerate(self.models)
        }
        titles: dict[str, Any] = {
            "x_title": "examples",
            "y_title": "squared error",
            "marks": {"zero": self.zero},
            "log": "y",
        }
        return lines(values, x=self.lengths, bands=bands, **titles)


def measure_errors(
    models: Mapping[str, HookedTransformer],
    data: InContextRegression,
    *,
    lengths: int | Sequence[int] | None = None,
    learners: Mapping[str, Learner] | None = None,
    tasks: int = 2048,
    seed: int = 0,
) -> ErrorsByLength:
    """How large are the errors of these models for each number of examples, beside those of learners?

    >>> from hooklens.data.regression import in_context_regression
    >>> from hooklens.plugins.algorithmic.icl import construct_descent
    >>> data = in_context_regression(2, (3, 4), inputs="normal")
    >>> step = best_step(moments_of(data), [3, 4], mean=False)
    >>> measured = measure_errors({"made by hand": construct_descent(step.learner(), 2, 4)}, data, tasks=64)
    >>> abs(measured.mean_excess("made by hand", measured.summed)[0]) < 0.5, measured.lengths.tolist()
    (True, [3, 4])

    `lengths` are those of the data by default, and `learners` those of `known_learners`. Prompts are drawn from
    `seed`, which no step of training uses.
    """
    need_task(data)
    ks = [whole("lengths", k, 1) for k in several("lengths", list(data.points) if lengths is None else lengths)]
    summed, averaged = single_steps(data, ks)
    shared = known_learners(data, ks) if learners is None else _named_learners(learners)
    need_named(models, [*shared, *known_learners(data, ks)])
    whole("tasks", tasks, 2), seed_number(seed)
    columns = []
    for k in ks:
        prompts = draw_prompts(replace(data, n_points=k, curriculum=0), tasks, seed=1000 * seed + k)
        own = averaged.own_learner(k)
        steps = [own, summed.learner(), averaged.learner()]
        columns.append(_column(models, steps, {OWN_STEP: own, **shared}, prompts))
    stacked = {name: torch.stack([column[name] for column in columns], -1) for name in columns[0]}
    (own_above, *above), (own_error, *above_errors) = stacked.pop("above"), stacked.pop("above_errors")
    return ErrorsByLength(
        lengths=torch.tensor(ks),
        tasks=tasks,
        models=list(models),
        excess=own_above / averaged.own_errors,
        excess_errors=own_error / averaged.own_errors,
        above=torch.stack(above),
        above_errors=torch.stack(above_errors),
        learners=[OWN_STEP, *shared],
        summed=summed,
        averaged=averaged,
        zero=summed.zero,
        **stacked,
    )


def need_named(models: Any, taken: Iterable[str]) -> None:
    """Raise unless these are models by names that nothing else beside them has.

    >>> need_named({}, [])
    Traceback (most recent call last):
    hooklens.core.errors.InputError: give at least one model by name, such as {'mine': model}; got {}
    """
    if not isinstance(models, Mapping) or not models:
        kind = InputError if isinstance(models, Mapping) else WrongType
        raise kind(f"give at least one model by name, such as {{'mine': model}}; got {models!r:.60}")
    reserved = {OWN_STEP, SCHEDULE, PLUS_PLUS, *taken}
    for name, model in models.items():
        need_hooked(model, f"the study of {name!r:.60}")
        if not isinstance(name, str) or name in reserved:
            raise InputError(f"a model has a name that no learner and no part of the study has; got {name!r:.60}")


def _named_learners(learners: Any) -> Mapping[str, Learner]:
    if not isinstance(learners, Mapping) or OWN_STEP in learners:
        raise InputError(f"learners are given by name, and {OWN_STEP!r} is measured anyway; got {learners!r:.80}")
    return {name: need_learner(learner) for name, learner in learners.items()}


def single_steps(data: InContextRegression, lengths: Sequence[int]) -> tuple[BestStep, BestStep]:
    """The best single steps for these lengths, on the loss summed over the examples and on its mean."""
    moments = moments_of(data)
    summed, averaged = (best_step(moments, lengths, noise=data.noise, mean=mean) for mean in (False, True))
    return summed, averaged


def known_learners(data: InContextRegression, lengths: Sequence[int]) -> dict[str, Learner]:
    """Learners without a search, by name, each the same for all lengths."""
    summed, averaged = single_steps(data, lengths)
    moments = moments_of(data)
    return {
        SHARED_STEP: summed.learner(),
        SHARED_MEAN: averaged.learner(),
        "preconditioned step": best_preconditioner(moments, lengths, noise=data.noise, mean=False),
        LEAST_SQUARES: LeastSquares(),
        "ridge, penalty 1": Ridge(1.0),
        "averaging": Averaging(float(moments.covariance[0, 0])),
        "zero": Zero(),
    }


def searched_learners(data: InContextRegression, lengths: Sequence[int], *, draws: int) -> dict[str, Learner]:
    """Six steps with the rates that have the smallest mean error on `draws` data sets of some of the lengths."""
    places = torch.linspace(0, len(lengths) - 1, min(len(lengths), _RATE_LENGTHS)).round().long().tolist()
    some = [lengths[place] for place in places]
    return {
        SCHEDULE: best_step_schedules(data, some, 6, draws=draws)[-1],
        PLUS_PLUS: best_gd_plus_plus(data, some, 6, draws=draws, larger=_LARGER)[-1],
    }


def _column(
    models: Mapping[str, HookedTransformer],
    steps: Sequence[Learner],
    learners: Mapping[str, Learner],
    prompts: RegressionPrompts,
) -> dict[str, Tensor]:
    """Mean errors at one length, and those of the models above those of single steps, prompt by prompt."""
    squares = {name: _answers(model, prompts).sub(prompts.target).square() for name, model in models.items()}
    known = {name: _learned(learner, prompts).sub(prompts.target).square() for name, learner in learners.items()}
    per_task = torch.stack(list(squares.values())).double()
    single = torch.stack([_learned(step, prompts).sub(prompts.target).square() for step in steps]).double()
    above = per_task - single[:, None]
    root = len(prompts) ** 0.5
    return {
        "errors": per_task.mean(1),
        "standard_errors": per_task.std(1) / root,
        "above": above.mean(-1),
        "above_errors": above.std(-1) / root,
        "learner_errors": torch.stack(list(known.values())).double().mean(1),
    }


def _learned(learner: Learner, prompts: RegressionPrompts) -> Float[Tensor, "task"]:
    weights = learner.weights(prompts.points.double(), prompts.answers.double())
    return (weights * prompts.query).sum(-1)


def _answers(model: HookedTransformer, prompts: RegressionPrompts) -> Float[Tensor, "task"]:
    with torch.no_grad():
        parts = [predict(model, part_of(prompts, start)) for start in range(0, len(prompts), _AT_ONCE)]
    return torch.cat(parts).cpu().double()


def part_of(prompts: RegressionPrompts, start: int, size: int = _AT_ONCE) -> RegressionPrompts:
    """Some of the prompts."""
    rows = slice(start, start + size)
    parts = {name: getattr(prompts, name)[rows] for name in ("points", "answers", "query", "target")}
    return replace(prompts, **parts)
