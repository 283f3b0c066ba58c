"""A trained model beside learners: predictions, sensitivities to the query, errors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hooklens.core.errors import InputError
from hooklens.core.gradients import need_gradients
from hooklens.data.regression import in_context_regression
from hooklens.model.config import VectorEmbed
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.icl.best_steps import best_step
from hooklens.plugins.algorithmic.icl.input_moments import moments_of
from hooklens.plugins.algorithmic.icl.learners import Learner, LeastSquares, Zero, need_learners
from hooklens.plugins.algorithmic.icl.regression_prompts import (
    PerTask,
    Queries,
    RegressionPrompts,
    draw_prompts,
    need_regression,
    predict,
    widened_prompts,
)
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table

PerLearner = Float[Tensor, "learner"]


@dataclass(frozen=True, eq=False)
class LearnerComparison(Result):
    """What a model and each learner answer on the same prompts, and the gradients of the answers by the query.

    A learner's gradient is its weights w. `sensitivity` are the model's effective weights: if its answer is linear in
    the query, answer = sensitivity x query.
    """

    ranked_by = "smallness of the prediction difference"
    baselines = ("error", "zero")
    terms = {
        "its error": "the learner's mean squared error on the same prompts",
        "difference": "mean |model's answer - learner's answer|",
        "share": "mean squared difference over the mean square of the learner's answers",
        "cosine": "cosine between the model's sensitivity and the learner's weights, averaged over prompts",
        "distance": "Euclidean distance between the two, averaged over prompts",
        "correlation": "Pearson correlation of the two over all prompts and coordinates",
        "slope": "the factor of the learner's weights that is closest to the sensitivity",
    }

    learners: list[str]
    n_points: int
    targets: PerTask
    answers: PerTask
    sensitivity: Queries
    learner_answers: Float[Tensor, "learner task"]
    learner_weights: Float[Tensor, "learner task d"]

    @property
    def error(self) -> float:
        """The model's mean squared error."""
        return float((self.answers - self.targets).square().mean())

    @property
    def zero(self) -> float:
        """The mean squared error of the answer 0."""
        return float(self.targets.square().mean())

    @property
    def learner_errors(self) -> PerLearner:
        """The learners' mean squared errors."""
        return (self.learner_answers - self.targets).square().mean(1)

    @property
    def difference(self) -> PerLearner:
        """Mean absolute difference of the answers (von Oswald et al. 2023, section 3: "Preds diff")."""
        return (self.answers - self.learner_answers).abs().mean(1)

    @property
    def share(self) -> PerLearner:
        """Mean squared difference over the learner's mean squared answer."""
        return (self.answers - self.learner_answers).square().mean(1) / self.learner_answers.square().mean(1)

    @property
    def cosine(self) -> PerLearner:
        """Mean cosine of the sensitivities (the same: "Model cos"); NaN for the answer 0, which has no direction."""
        cosines = F.cosine_similarity(self.sensitivity[None], self.learner_weights, dim=-1).mean(1)
        return cosines.masked_fill(~self.learner_weights.flatten(1).any(1), torch.nan)

    @property
    def distance(self) -> PerLearner:
        """Mean distance of the sensitivities (the same: "Model diff")."""
        return (self.sensitivity - self.learner_weights).norm(dim=-1).mean(1)

    @property
    def correlation(self) -> PerLearner:
        """Pearson correlation of effective weights and the learner's weights."""
        ours, theirs = self.sensitivity.flatten(), self.learner_weights.flatten(1)
        ours, theirs = ours - ours.mean(), theirs - theirs.mean(1, keepdim=True)
        return theirs @ ours / (theirs.norm(dim=1) * ours.norm())

    @property
    def slope(self) -> PerLearner:
        """Least-squares slope, through 0, of the effective weights on the learner's."""
        theirs = self.learner_weights.flatten(1)
        return theirs @ self.sensitivity.flatten() / theirs.square().sum(1)

    def table(self, n: int | None = None) -> Table:
        """One row a learner, the closest answers first."""
        columns = ("learner", "its error", "difference", "share", "cosine", "distance", "correlation", "slope")
        parts = (self.learner_errors, self.difference, self.share, self.cosine, self.distance)
        cells = [part.tolist() for part in (*parts, self.correlation, self.slope)]
        rows = list(zip(self.learners, *cells, strict=True))
        return Table(columns, [rows[i] for i in self.difference.argsort(stable=True).tolist()]).head(n)

    def figure(self) -> Any:
        """The model's answers against those of the closest learner."""
        from hooklens.viz.curves import scatter

        best = int(self.difference.argmin())
        title = f"Answers to {len(self.targets)} prompts"
        across, up = self.learners[best], "model"
        return scatter(self.learner_answers[best], self.answers, title=title, x_title=across, y_title=up)


def compare_learners(
    model: HookedTransformer, prompts: RegressionPrompts, learners: Learner | Sequence[Learner]
) -> LearnerComparison:
    """Which of these learners does the model compute, judged by its answers and its gradients?

    >>> from hooklens.plugins.algorithmic.icl.constructions import construct_descent
    >>> data = in_context_regression(d=2, n_points=5)
    >>> step = best_step(moments_of(data), 5).learner()
    >>> compared = compare_learners(construct_descent(step, 2, 5), draw_prompts(data, 50), [step, LeastSquares()])
    >>> compared.table(1).rows[0][0], round(float(compared.cosine[0]), 4)
    ('one step of gradient descent', 1.0)

    Reference: von Oswald et al. (2023), section 3, "One-step of gradient descent vs. a single trained self-attention
    layer".
    """
    asked = need_learners(learners)
    if not asked:
        raise InputError("compare_learners needs at least one learner; got none")
    need_regression(model, prompts)
    prompts = widened_prompts(model, prompts)
    answers, gradients = (part.to(prompts.query) for part in sensitivity_of(model, prompts))
    with torch.no_grad():
        weights = torch.stack([learner.weights(prompts.points, prompts.answers) for learner in asked])
    return LearnerComparison(
        learners=[learner.title for learner in asked],
        n_points=prompts.n_points,
        targets=prompts.target,
        answers=answers,
        sensitivity=gradients,
        learner_answers=(weights * prompts.query).sum(-1),
        learner_weights=weights,
    )


def sensitivity_of(model: HookedTransformer, prompts: RegressionPrompts) -> tuple[PerTask, Queries]:
    """The model's answers, and their gradients by the query."""
    need_gradients("a comparison of gradients")
    need_regression(model, prompts)
    with torch.enable_grad():
        query = prompts.query.to(model.W_U).detach().clone().requires_grad_()
        answers = predict(model, replace(prompts.to(model.W_U), query=query))
        (gradients,) = torch.autograd.grad(answers.sum(), query)
    return answers.detach(), gradients


def demo(model: HookedTransformer) -> LearnerComparison | Needs:
    """Sixteen prompts of 4 points, if the model reads vectors and answers with one number."""
    embed = model.cfg.embed
    if not isinstance(embed, VectorEmbed) or embed.d_in < 2 or model.cfg.d_vocab_out != 1 or model.cfg.n_ctx < 5:
        return Needs("vectors (x, y) as input and one output")
    data = in_context_regression(d=embed.d_in - 1, n_points=4)
    step = best_step(moments_of(data), 4).learner()
    return compare_learners(model, draw_prompts(data, 16), [step, LeastSquares(), Zero()])
