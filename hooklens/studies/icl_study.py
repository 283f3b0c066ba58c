"""In-context learning as gradient descent: what trained models do, beside learners that are known."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hooklens.core.arguments import whole
from hooklens.core.errors import InputError
from hooklens.data.regression import InContextRegression
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.icl import (
    AttentionRegression,
    DepthGap,
    Learner,
    LearnerComparison,
    RegressionPrompts,
    Zero,
    compare_learners,
    draw_prompts,
    measure_depth_gap,
    regress_attention,
)
from hooklens.results.result import Result, Table
from hooklens.studies.icl_errors import (
    LEAST_SQUARES,
    OWN_STEP,
    SHARED_STEP,
    ErrorsByLength,
    known_learners,
    measure_errors,
    searched_learners,
)

_COMPARED = 512  # prompts of a comparison of answers and gradients
_GAP_DRAWS = 2000  # data sets on which the best rates of each depth are searched; seconds
_MODEL = {
    "layers": "depth of the model",
    "error": "mean squared error of the answer, averaged over all numbers of examples; the answer 0 has {zero:.3g}",
    "standard error": "of that mean, over prompts",
    "of one step": "its ratio to the exact error of the best single step that is the same for all numbers of examples",
    "at {at}": "the error with {at} examples; least squares has 0 there, up to rounding",
    "closest learner": "the learner whose answers to these prompts differ least from the model's",
    "share": "that difference, squared, over the mean square of the learner's answers",
    "cosine": "between the gradients of model and learner by the query, averaged over prompts",
}


@dataclass(frozen=True, eq=False)
class ICLStudy(Result):
    """What models trained on in-context regression do, beside learners.

    `errors` are those under the curriculum, `fixed` those of a model at one number of examples, None without one.
    `comparisons` are on prompts of `at` examples; "fixed" has its own number. `attention` is that of one-layer models.
    """

    ranked_by = "smallness of the mean error"

    at: int
    errors: ErrorsByLength
    fixed: ErrorsByLength | None
    depths: dict[str, int]
    comparisons: dict[str, LearnerComparison]
    attention: dict[str, AttentionRegression]
    gap: DepthGap | None

    def table(self, n: int | None = None) -> Table:
        """One row a model: its errors, and the learner that it is closest to."""
        rows = []
        for i, model in enumerate(self.errors.models):
            errors, spread = self.errors.errors[i], self.errors.standard_errors[i]
            mean, beside = float(errors.mean()), float(spread.square().sum().sqrt() / len(errors))
            closest, _, _, share, cosine = self.comparisons[model].table(1).rows[0][:5]
            ratio = mean / self.errors.summed.error
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
        return said if self.gap is None else [*said, f"The best learners by depth: {self.gap.sentence}."]

    def _fixed_finding(self, fixed: ErrorsByLength) -> str:
        k, excess, error = int(fixed.lengths[0]), float(fixed.excess[0, 0]), float(fixed.excess_errors[0, 0])
        cosine = _named(self.comparisons["fixed"], OWN_STEP, "cosine")
        verdict = "within 2 %" if abs(excess) < 0.02 else "NOT within 2 %"
        return (
            f"Trained at {k} examples alone, linear attention has an error {excess:+.2%} (standard error {error:.2%}) "
            f"from that of the best step of gradient descent there: {verdict}. The cosine of their gradients by the "
            f"query is {cosine:.4f}."
        )

    def _step_finding(self, model: str) -> str:
        excess, error = self.errors.mean_excess(model, self.errors.summed)
        averaged, _ = self.errors.mean_excess(model, self.errors.averaged)
        compared, attention = self.comparisons[model], self.attention[model]
        return (
            f"Over all numbers of examples, {model} has an error {excess:+.1%} (standard error {error:.1%}) from that "
            f"of the best single step of this mixture on the summed loss, and {averaged:+.1%} from that on the mean "
            f"loss. With {self.at} examples the cosine of its gradients with those of the summed step is "
            f"{_named(compared, SHARED_STEP, 'cosine'):.4f}, and inner products explain {attention.r2_within:.1%} of "
            "the variance of its attention scores within a prompt."
        )

    def _gap_finding(self, model: str) -> str:
        zero, error, least = self.errors.zero, self._at(model), self._at(LEAST_SQUARES)
        best = float(self.errors.averaged.own_errors[self.errors.lengths == self.at][0])
        closest, _, _, share = self.comparisons[model].table(1).rows[0][:4]
        layers = self.depths[model]
        return (
            f"With {self.at} examples, {model} ({layers} {'layer' if layers == 1 else 'layers'}) leaves "
            f"{error / zero:.3g} of the variance unexplained, the best single step {best / zero:.3g}, least squares "
            f"{least / zero:.2g}. Of the learners, its answers are closest to those of {closest} (mean squared "
            f"difference {share:.3g} of their mean square)."
        )

    def report(self) -> Any:
        """The study as a page."""
        from hooklens.viz.report import Report

        report = Report("In-context learning as gradient descent")
        report.text(
            "Every prompt is a regression with weights of its own. A model that answers it has learned an algorithm. "
            "Its answers and their gradients are compared with those of known algorithms on the same prompts. "
            "Agreement on these prompts does not show that a model computes the answer by the same steps."
        )
        for finding in self.findings:
            report.text(finding)
        values = {"zero": self.errors.zero, "at": self.at}
        terms = {name.format(**values): text.format(**values) for name, text in _MODEL.items()}
        report.table(self.table(), f"{self.errors.tasks:,} fresh prompts for each number of examples.", terms)
        report.heading("Error by number of examples").figure(
            self.figure(),
            "Bands are two standard errors wide on each side. The best step at each length may choose its rate anew; "
            "the summed step has one rate for all. Values of 0 are drawn at a thousandth of the error of the answer 0.",
        ).table(self.errors.table(), "All numbers of examples.")
        report.heading("Which algorithm?")
        for name, compared in self.comparisons.items():
            caption = f"{name}, on {len(compared.targets)} prompts of {compared.n_points} examples."
            report.table(compared.table(), caption, LearnerComparison.terms)
        report.heading("Attention against inner products")
        for name, attention in self.attention.items():
            caption = (
                f"{name}: slope {attention.slope:.3g}, R^2 within a prompt {attention.r2_within:.3f}; products with "
            )
            report.figure(
                attention.figure(), f"{caption}the points of another prompt explain {attention.random_r2:.3f}."
            )
        if self.gap is not None:
            report.heading("The gap to least squares by depth").figure(self.gap.figure()).table(self.gap.table())
        return report


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
    lengths = list(data.points)
    at = lengths[len(lengths) // 2] if at is None else whole("at", at, 1)
    if at not in lengths:
        raise InputError(f"at is one of the numbers of examples of the data, {lengths[0]} to {lengths[-1]}; got {at}")
    if not models:
        raise InputError("study_in_context needs at least one model, by name; got none")
    learners = known_learners(data, lengths) | (searched_learners(data, lengths, draws=tasks) if searched else {})
    errors = measure_errors(models, data, learners=learners, tasks=tasks, seed=seed)
    one_length = replace(data, n_points=at, curriculum=0)
    prompts = draw_prompts(one_length, min(tasks, _COMPARED), seed=seed + 1)
    learners = {OWN_STEP: errors.averaged.own_learner(at), **learners}
    comparisons = {name: _compared(model, prompts, learners) for name, model in models.items()}
    shallow = {name: model for name, model in models.items() if model.cfg.n_layers == 1}
    measured = None
    if fixed is not None:
        model, own = fixed
        measured = measure_errors({"fixed": model}, own, tasks=4 * tasks, seed=seed)
        own_learners = {OWN_STEP: measured.averaged.learner(), **known_learners(own, list(own.points))}
        comparisons["fixed"] = _compared(model, draw_prompts(own, min(tasks, _COMPARED), seed=seed + 1), own_learners)
    return ICLStudy(
        at=at,
        errors=errors,
        fixed=measured,
        depths={name: model.cfg.n_layers for name, model in models.items()},
        comparisons=comparisons,
        attention={name: regress_attention(model, prompts) for name, model in shallow.items()},
        gap=measure_depth_gap(one_length, draws=min(_GAP_DRAWS, 10 * tasks), seed=seed) if searched else None,
    )


def _compared(
    model: HookedTransformer, prompts: RegressionPrompts, learners: Mapping[str, Learner]
) -> LearnerComparison:
    """Of all learners but the answer 0, which has no gradient and no size to compare with."""
    named = {name: learner for name, learner in learners.items() if not isinstance(learner, Zero)}
    return replace(compare_learners(model, prompts, list(named.values())), learners=list(named))


def _named(compared: LearnerComparison, learner: str, quantity: str) -> float:
    values: torch.Tensor = getattr(compared, quantity)
    return float(values[compared.learners.index(learner)])
