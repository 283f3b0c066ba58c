"""In-context learning as gradient descent: what trained models do, beside learners that are known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from hooklens.core.arguments import flag, seed_number, whole
from hooklens.core.errors import HooklensError, InputError, WrongType
from hooklens.core.gradients import need_gradients
from hooklens.core.terminal import visible
from hooklens.data.regression import InContextRegression
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.cost_table import CostTable, MeasuredModel, compare_costs
from hooklens.plugins.algorithmic.icl import (
    AttentionRegression,
    DepthGap,
    KernelComparison,
    Learner,
    LearnerComparison,
    RankCollapse,
    RegressionPrompts,
    ShiftErrors,
    WeightInterpolation,
    Zero,
    compare_learners,
    compare_with_kernel,
    draw_prompts,
    interpolate_weights,
    measure_depth_gap,
    measure_rank_collapse,
    measure_shifts,
    regress_attention,
)
from hooklens.plugins.algorithmic.icl.input_moments import need_task
from hooklens.plugins.algorithmic.icl.regression_prompts import need_regression
from hooklens.results.result import Result, Table
from hooklens.studies.icl_errors import (
    LEAST_SQUARES,
    OWN_STEP,
    ROUNDING,
    SHARED_STEP,
    ErrorsByLength,
    known_learners,
    measure_errors,
    need_named,
    searched_learners,
)

FIXED = "fixed"  # the model at one number of examples
_COMPARED = 512  # prompts of a comparison of answers and gradients
_RUN = 64  # prompts whose activations are kept
_CLOSE = 0.1  # of the mean square of a learner's answers: with more, answers are not called close to it
_GAP_DRAWS = 2000  # data sets on which the best rates of each depth are searched; seconds


@dataclass(frozen=True, eq=False)
class ICLStudy(Result):
    """What models trained on in-context regression do, beside learners.

    `errors` are those under the curriculum, `fixed` those of a model at one number of examples, None without one.
    `comparisons` are on prompts of `at` examples; "fixed" has its own number. `attention` is that of one-layer models,
    each head of its own; `kernels` compare softmax heads of one layer with a kernel smoother, `interpolations` the
    weights of linear attention with those of the construction, and `collapses` are those of deeper models; `left_out`
    says which of these a model does not have, and why. `fixed_as` is what the model at one number of examples is.
    """

    ranked_by = "smallness of the mean error"

    at: int
    errors: ErrorsByLength
    fixed: ErrorsByLength | None
    depths: dict[str, int]
    comparisons: dict[str, LearnerComparison]
    attention: dict[str, AttentionRegression]
    kernels: dict[str, KernelComparison]
    interpolations: dict[str, WeightInterpolation]
    shifts: dict[str, ShiftErrors]
    collapses: dict[str, RankCollapse]
    costs: CostTable
    gap: DepthGap | None
    fixed_as: str = field(default="a model", repr=False)
    left_out: list[str] = field(default_factory=list)

    def table(self, n: int | None = None) -> Table:
        """One row a model: its errors, and the learner that it is closest to."""
        rows = []
        for i, model in enumerate(self.errors.models):
            errors, spread = self.errors.errors[i], self.errors.standard_errors[i]
            mean, beside = float(errors.mean()), float(spread.square().sum().sqrt() / len(errors))
            closest, _, _, share, cosine = self.comparisons[model].table(1).rows[0][:5]
            ratio = 1 + self.errors.mean_excess(model, self.errors.summed)[0]  # prompt by prompt
            rows.append((model, self.depths[model], mean, beside, ratio, self._at(model), closest, share, cosine))
        rows.sort(key=lambda row: row[2])
        columns = ("model", "layers", "error", "standard error", "of one step", f"at {self.at}")
        return Table((*columns, "closest learner", "share", "cosine"), rows).head(n)

    def _at(self, name: str) -> float:
        return float(self.errors.error_of(name)[self.errors.lengths == self.at][0])

    def figure(self) -> Any:
        """Errors by the number of examples."""
        return self.errors.figure()

    @property
    def findings(self) -> list[str]:
        """What the numbers say, in sentences."""
        said = [] if self.fixed is None else [self._fixed_finding(self.fixed)]
        said += [self._step_finding(model) for model in self.errors.models if self.depths[model] == 1]
        said += [self._gap_finding(model) for model in self.errors.models]
        if self.gap is not None:
            said.append(f"Learners by depth, with searched rates: {self.gap.sentence}.")
        return [visible(sentence) for sentence in [*said, *self.left_out]]

    def _fixed_finding(self, fixed: ErrorsByLength) -> str:
        k, excess, error = int(fixed.lengths[0]), float(fixed.excess[0, 0]), float(fixed.excess_errors[0, 0])
        cosine = _named(self.comparisons[FIXED], OWN_STEP, "cosine")
        verdict = "within 2 %" if abs(excess) < 0.02 else "NOT within 2 %"
        return (
            f"Trained at {k} examples alone, {self.fixed_as} ({FIXED} in the tables) has an error {_beside(excess)} "
            f"(standard error {error:.2%}) that of the best step of gradient descent there: {verdict}. The cosine "
            f"of their gradients by the query is {cosine:.4f}."
        )

    def _step_finding(self, model: str) -> str:
        excess, error = self.errors.mean_excess(model, self.errors.summed)
        averaged, _ = self.errors.mean_excess(model, self.errors.averaged)
        compared, heads = self.comparisons[model], self._heads(model)
        explained = " and ".join(f"{head.r2_within:.2%}" for head in heads)
        return (
            f"Over all numbers of examples, {model} has an error {_beside(excess)} (standard error {error:.2%}) that "
            f"of the best single step of this mixture on the summed loss, and {_beside(averaged)} that on the mean "
            f"loss. With {self.at} examples the cosine of its gradients with those of the summed step is "
            f"{_named(compared, SHARED_STEP, 'cosine'):.4f}, and inner products explain {explained} of the variance of "
            f"the query's attention scores within a prompt.{self._kernel_finding(model)}"
        )

    def _heads(self, model: str) -> list[AttentionRegression]:
        return [part for name, part in self.attention.items() if name == model or name.startswith(f"{model}, head ")]

    def _kernel_finding(self, model: str) -> str:
        """How far softmax attention is from the kernel smoother of its queries and keys."""
        if model not in self.kernels:
            return ""
        kernel = self.kernels[model]
        away = " and ".join(
            f"{near:.3f} (equal weights: {equal:.3f})"
            for near, equal in zip(kernel.kernel.flatten().tolist(), kernel.uniform.flatten().tolist(), strict=True)
        )
        smoother = "Nadaraya-Watson weights of the same queries and keys (0: equal, 1: disjoint)"
        return f" The distance of its patterns is {away} from {smoother}."

    def _gap_finding(self, model: str) -> str:
        """What is left with `at` examples beside learners, all on the same prompts."""
        zero = self.errors.zero
        error, least, own, shared = (self._at(name) / zero for name in (model, LEAST_SQUARES, OWN_STEP, SHARED_STEP))
        spread = self.errors.standard_errors[self.errors.models.index(model)][self.errors.lengths == self.at][0] / zero
        layers = self.depths[model]
        left = f"{least:.2g}" if least > ROUNDING else "nothing but rounding"
        return (
            f"With {self.at} examples, {model} ({layers} {'layer' if layers == 1 else 'layers'}) leaves {error:.3g} "
            f"(standard error {spread:.1g}) of the variance unexplained; on the same prompts the best step of the "
            f"mixture leaves {shared:.3g}, the best step with a rate for {self.at} examples {own:.3g}, least squares "
            f"{left}. By mean absolute difference, its answers are {said_closest(self.comparisons[model])}."
        )

    def report(self) -> Any:
        """The study as a page."""
        from hooklens.studies.icl_page import icl_report

        return icl_report(self)


def said_closest(compared: LearnerComparison) -> str:
    """The learner that the answers are closest to, or that they are close to none."""
    closest, _, _, share, cosine = compared.table(1).rows[0][:5]
    near = f"closest to those of {closest}" if share < _CLOSE else f"close to no learner; the nearest is {closest}"
    return f"{near} (mean squared difference {share:.3g} of its mean square, cosine of gradients {cosine:.4f})"


def study_in_context(
    models: Mapping[str, HookedTransformer],
    data: InContextRegression,
    *,
    fixed: tuple[HookedTransformer, InContextRegression] | None = None,
    at: int | None = None,
    searched: bool = True,
    tasks: int = 2048,
    seed: int = 0,
) -> ICLStudy:
    """What do models trained on these data do, beside gradient descent, least squares and others?

    >>> from hooklens.data.regression import in_context_regression
    >>> from hooklens.plugins.algorithmic.icl import GradientDescent, construct_descent
    >>> model = construct_descent(GradientDescent((0.2,), mean=False), 2, 3)
    >>> study = study_in_context({"made by hand": model}, in_context_regression(2, (2, 3)), searched=False, tasks=16)
    >>> study.at, len(study.table()), len(study.findings)
    (3, 1, 2)

    `fixed` is a model that was trained at one number of examples, with its data. Comparisons of answers and gradients
    are on prompts with `at` examples, by default in the middle of the range. `searched` adds six steps of gradient
    descent and of GD++, and the best learners by depth: a search of their rates, which takes up to a minute.

    References: those of the methods in `hooklens.plugins.algorithmic.icl`.
    """
    need_task(data)
    flag("searched", searched), whole("tasks", tasks, 2), seed_number(seed)
    need_gradients("study_in_context")
    lengths = list(data.points)
    at = lengths[len(lengths) // 2] if at is None else whole("at", at, 1)
    if at not in lengths:
        raise InputError(f"at is one of the numbers of examples of the data, {lengths[0]} to {lengths[-1]}; got {at}")
    _check_models(models, data, fixed)
    learners = known_learners(data, lengths) | (searched_learners(data, lengths, draws=tasks) if searched else {})
    errors = measure_errors(models, data, learners=learners, tasks=tasks, seed=seed)
    one_length = replace(data, n_points=at, curriculum=0)
    prompts = draw_prompts(one_length, min(tasks, _COMPARED), seed=seed + 1)
    learners = {OWN_STEP: errors.averaged.own_learner(at), **learners}
    comparisons = {name: _compared(model, prompts, learners) for name, model in models.items()}
    rows = [_cost(name, model, prompts, errors, comparisons) for name, model in models.items()]
    measured = None
    if fixed is not None:
        model, own = fixed
        measured = measure_errors({FIXED: model}, own, tasks=4 * tasks, seed=seed)
        own_learners = {OWN_STEP: measured.averaged.learner(), **known_learners(own, list(own.points))}
        own_prompts = draw_prompts(own, min(tasks, _COMPARED), seed=seed + 1)
        comparisons[FIXED] = _compared(model, own_prompts, own_learners)
        rows.insert(0, _cost(FIXED, model, own_prompts, measured, comparisons))
    return ICLStudy(
        at=at,
        errors=errors,
        fixed=measured,
        fixed_as="" if fixed is None else _kind(fixed[0]),
        depths={name: model.cfg.n_layers for name, model in models.items()},
        comparisons=comparisons,
        shifts={name: _shifted(model, data, one_length, learners, tasks) for name, model in models.items()},
        costs=compare_costs(rows),
        gap=measure_depth_gap(one_length, draws=min(_GAP_DRAWS, 10 * tasks), seed=seed) if searched else None,
        **_insides(models, prompts, learners[SHARED_STEP]),
    )


def _insides(models: Mapping[str, HookedTransformer], prompts: RegressionPrompts, step: Learner) -> dict[str, Any]:
    """What is read off activations and weights, by the kind of the model, and what this kind of model does not have."""
    tokens = prompts.tokens()[:_RUN]
    parts: dict[str, dict[str, Any]] = {"attention": {}, "kernels": {}, "interpolations": {}, "collapses": {}}
    left_out = []
    for name, model in models.items():
        measure: Callable[[], Any] = partial(measure_rank_collapse, model, tokens)
        part, what = "collapses", "rank collapse"
        if model.cfg.n_layers == 1:
            parts["attention"] |= {
                key: regress_attention(model, prompts, head=head) for head, key in enumerate(_head_names(name, model))
            }
            measure, part, what = partial(compare_with_kernel, model, tokens), "kernels", "the kernel smoother"
            if model.cfg.score_fn.name == "linear":
                measure, part = partial(interpolate_weights, model, prompts, step), "interpolations"
                what = "the interpolation of weights"
        try:
            parts[part][name] = measure()
        except HooklensError as error:  # the rest of the study is kept
            left_out.append(f"{name} is studied without {what}: {error}.")
    return dict(parts, left_out=left_out)


def _head_names(name: str, model: HookedTransformer) -> list[str]:
    n = model.cfg.n_heads
    return [f"{name}, head {head}" for head in range(n)] if n > 1 else [name]


def _kind(model: HookedTransformer) -> str:
    """What a model is, in words."""
    n, score = model.cfg.n_layers, model.cfg.score_fn.name
    layers = "one layer" if n == 1 else f"{n} layers"
    return f"a model of {layers} of {score} attention" + " with MLPs" * (not model.cfg.attn_only)


def _check_models(models: Any, data: InContextRegression, fixed: Any) -> None:
    """Raise before any work unless the models have names of their own and read the longest prompts."""
    need_named(models, [FIXED, *known_learners(data, data.points)])
    need_named(models, [name for name in models for other in models if name.startswith(f"{other}, head ")])
    asked = [(model, replace(data, n_points=data.points[-1], curriculum=0)) for model in models.values()]
    if fixed is not None:
        if not isinstance(fixed, tuple) or len(fixed) != 2:
            raise WrongType(f"fixed is a model and its data, (model, data); got {fixed!r:.60}")
        need_task(fixed[1])
        if len(numbers := fixed[1].points) > 1:
            raise InputError(
                f"fixed is a model at one number of examples, and its data have {numbers[0]} to {numbers[-1]}; give "
                "such a model in `models`, and its data as `data`"
            )
        asked.append(fixed)
    for model, own in asked:
        need_regression(model, draw_prompts(own, 1))


def _shifted(
    model: HookedTransformer,
    data: InContextRegression,
    one_length: InContextRegression,
    learners: Mapping[str, Learner],
    tasks: int,
) -> ShiftErrors:
    """Points of other scales, longer prompts where the model reads them, and other dimensions."""
    most = (model.cfg.n_ctx - 1) // (2 if data.interleaved else 1)
    longer = [k for k in (3 * data.points[-1] // 2, 2 * data.points[-1]) if k <= most]
    shown = [learners[name] for name in (SHARED_STEP, LEAST_SQUARES)]
    dims = (max(1, data.d // 2), data.d + data.d // 2)
    return measure_shifts(model, one_length, shown, lengths=longer, dims=dims, tasks=min(tasks, _COMPARED))


def _cost(
    name: str,
    model: HookedTransformer,
    prompts: RegressionPrompts,
    errors: ErrorsByLength,
    comparisons: Mapping[str, LearnerComparison],
) -> MeasuredModel:
    """A row of the table of costs; what a model implements is said by the learner that its answers are closest to."""
    return MeasuredModel(
        name=name,
        model=model,
        inputs=prompts.tokens().to(model.W_U),
        measure="MSE",
        value=float(errors.error_of(name).mean()),
        implements=f"answers {said_closest(comparisons[name])}",
    )


def _compared(
    model: HookedTransformer, prompts: RegressionPrompts, learners: Mapping[str, Learner]
) -> LearnerComparison:
    """Of all learners but the answer 0, which has no gradient and no size to compare with."""
    named = {name: learner for name, learner in learners.items() if not isinstance(learner, Zero)}
    return replace(compare_learners(model, prompts, list(named.values())), learners=list(named))


def _beside(excess: float) -> str:
    """How an error lies beside another."""
    return f"{abs(excess):.2%} {'above' if excess >= 0 else 'below'}"


def _named(compared: LearnerComparison, learner: str, quantity: str) -> float:
    values: torch.Tensor = getattr(compared, quantity)
    return float(values[compared.learners.index(learner)])
