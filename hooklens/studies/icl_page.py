"""The page of a study of in-context learning."""

from typing import TYPE_CHECKING

from hooklens.plugins.algorithmic.cost_table import CostTable
from hooklens.plugins.algorithmic.icl import KernelComparison, LearnerComparison, RankCollapse, ShiftErrors

if TYPE_CHECKING:
    from hooklens.studies.icl_study import ICLStudy
    from hooklens.viz.report import Report

_INTRODUCTION = (
    "Every prompt is a regression with weights of its own. A model that answers it has learned an algorithm. Its "
    "answers and their gradients are compared with those of known algorithms on the same prompts. Agreement on these "
    "prompts does not show that a model computes the answer by the same steps."
)
_BANDS = (
    "Bands are two standard errors wide on each side. The best step at each length may choose its rate anew; the "
    "summed step has one rate for all. Least squares ends where it has no error but rounding."
)


def icl_report(study: "ICLStudy") -> "Report":
    """All numbers and figures of the study, the findings first."""
    from hooklens.viz.report import Report

    report = Report("In-context learning as gradient descent").text(_INTRODUCTION)
    for finding in study.findings:
        report.text(finding)
    tasks = f"{study.errors.tasks:,} fresh prompts for each number of examples."
    report.table(study.table(), tasks, _terms(study))
    report.heading("Error by number of examples").figure(study.figure(), _BANDS)
    with report.fold("The errors of all numbers of examples"):
        report.table(study.errors.table(), "Mean squared errors of models and learners, on the same prompts.")
    report.heading("Which algorithm?")
    for name, compared in study.comparisons.items():
        caption = f"{name}, on {len(compared.targets)} prompts of {compared.n_points} examples."
        report.table(compared.table(), caption, LearnerComparison.terms)
    _attention(report, study)
    _limits(report, study)
    if study.gap is not None:
        report.heading("The gap to least squares by depth").figure(study.gap.figure()).table(study.gap.table())
    return report.heading("What a prompt costs").table(study.costs.table(), _costed(study), CostTable.terms)


def _terms(study: "ICLStudy") -> dict[str, str]:
    return {
        "layers": "depth of the model",
        "error": "mean squared error of the answer, averaged over all numbers of examples; the answer 0 has "
        f"{study.errors.zero:.3g}",
        "standard error": "of that mean, over prompts",
        "of one step": "its ratio to the exact error of the best single step that is the same for all numbers of "
        "examples, on the loss summed over examples",
        f"at {study.at}": f"the error with {study.at} examples; least squares has none from as many examples as "
        "dimensions on, up to rounding",
        "closest learner": "the learner with the smallest mean absolute difference between its answers and the model's",
        "share": "the mean squared difference over the mean square of the learner's answers",
        "cosine": "between the gradients of model and learner by the query, averaged over prompts",
    }


def _costed(study: "ICLStudy") -> str:
    own = (
        "" if study.fixed is None else f", of {int(study.fixed.lengths[0])} for fixed, which was trained on these alone"
    )
    return f"A prompt of {study.at} examples{own}. MSE over all numbers of examples of the training."


def _attention(report: "Report", study: "ICLStudy") -> None:
    """Scores against inner products, softmax against the kernel smoother, and the way to the construction."""
    report.heading("Attention against inner products")
    for name, attention in study.attention.items():
        report.figure(
            attention.figure(name),
            f"{name}, {attention.head}: slope {attention.slope:.3g}, R^2 within a prompt {attention.r2_within:.3f}; "
            f"products with the points of another prompt explain {attention.random_r2:.3f}. The rows of the "
            "examples do not reach the answer, and are left out.",
        )
    for name, compared in study.kernels.items():
        report.table(compared.table(), f"{name}: the pattern beside a kernel smoother.", KernelComparison.terms)
    for name, way in study.interpolations.items():
        report.figure(
            way.figure(),
            f"{name}: between the trained weights (0) and the construction's (1). {_barrier(way.barrier)} W_KQ is the "
            "product of trained key and query weights, rescaled, by coordinates of a token (x, y): a score is "
            "key W_KQ query. In the construction it is the identity on x, and 0 on y. The column of the query's y has "
            "no effect: the query's y is 0.",
        )


def _barrier(height: float) -> str:
    if height <= 0:
        return "The error is nowhere above the line between the ends."
    return f"The error is at most {height:.2g} above the line between the ends."


def _limits(report: "Report", study: "ICLStudy") -> None:
    """Prompts unlike those of training, and whether positions stay apart."""
    report.heading("Prompts unlike those of training")
    for name, shifts in study.shifts.items():
        report.table(
            shifts.table(),
            f"{name}: errors, as shares of that of the answer 0. {study.at} examples unless said.",
            ShiftErrors.terms,
        )
    for name, collapse in study.collapses.items():
        report.figure(collapse.figure(), f"{name}: how much of the stream differs between positions after each layer.")
        report.table(collapse.table(), "", RankCollapse.terms)
