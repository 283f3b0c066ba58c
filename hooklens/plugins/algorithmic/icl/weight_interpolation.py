"""The weights between a trained layer of linear attention and the hand-built one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hooklens.core.arguments import real, several
from hooklens.core.errors import InputError
from hooklens.data.regression import in_context_regression
from hooklens.model.config import Causal, LinearScore, NoMask, NoPositions, VectorEmbed
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.plugins.algorithmic.icl.best_steps import best_step
from hooklens.plugins.algorithmic.icl.constructions import construct_descent
from hooklens.plugins.algorithmic.icl.input_moments import uniform_moments
from hooklens.plugins.algorithmic.icl.learners import Learner
from hooklens.plugins.algorithmic.icl.regression_prompts import RegressionPrompts, draw_prompts, need_regression
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table

Form = Float[Tensor, "d_in d_in"]
Read = Float[Tensor, "d_in"]


@dataclass(frozen=True, eq=False)
class WeightProducts(Result):
    """The whole function of one layer of linear attention with one head, between its input and its output.

    answer = sum_i (e_i . values) (e_i^T scores e_query) + direct . e_query over the tokens e. `scores` is W_KQ with the
    division of the scores in it; `values` is the row of W_PV that the unembedding reads.
    """

    scores: Form
    values: Read
    direct: Read

    def answers(self, tokens: Float[Tensor, "task pos d_in"]) -> Float[Tensor, "task"]:
        """The answers at the last token; they equal the model's."""
        query = tokens[:, -1]
        attention = (tokens @ self.scores @ query[..., None])[..., 0]
        return (attention * (tokens @ self.values)).sum(1) + query @ self.direct

    def rescaled(self) -> "WeightProducts":
        """The same function, with the mean of the diagonal of `scores` over the point moved to `values`."""
        beta = self.scores.diagonal()[:-1].mean()
        return WeightProducts(self.scores / beta, self.values * beta, self.direct)

    def figure(self) -> Any:
        """W_KQ as a heat map."""
        from hooklens.viz.figures import heatmap

        return heatmap(self.scores, title="W_KQ", x_title="query coordinate", y_title="key coordinate")


@dataclass(frozen=True, eq=False)
class WeightInterpolation(Result):
    """Errors of weights between the trained ones (0) and the construction's (1).

    What is interpolated are the products W_KQ and W_PV in the coordinates of the tokens, after the rescaling, and the
    direct path. They do not change with the basis inside the head, so that this symmetry needs no correction.
    """

    alphas: Float[Tensor, "alpha"]
    errors: Float[Tensor, "alpha"]
    midpoint: float
    zero: float
    trained: WeightProducts
    constructed: WeightProducts

    @property
    def straight(self) -> Float[Tensor, "alpha"]:
        """The line between the two errors at the ends."""
        return self.errors[0] + self.alphas * (self.errors[-1] - self.errors[0])

    @property
    def barrier(self) -> float:
        """How far the errors rise above the line at most; 0 or below means that the two are linearly connected."""
        return float((self.errors - self.straight)[1:-1].max())

    @property
    def scores_cosine(self) -> float:
        """The cosine between the two W_KQ as vectors."""
        return float(F.cosine_similarity(self.trained.scores.flatten(), self.constructed.scores.flatten(), dim=0))

    @property
    def values_cosine(self) -> float:
        """The cosine between the two rows of W_PV."""
        return float(F.cosine_similarity(self.trained.values, self.constructed.values, dim=0))

    def table(self, n: int | None = None) -> Table:
        """One row a place between the two."""
        rows = zip(self.alphas.tolist(), self.errors.tolist(), self.straight.tolist(), strict=True)
        return Table(("share of the construction", "squared error", "line between the ends"), list(rows)).head(n)

    def figure(self) -> Any:
        """The errors along the way, above the trained W_KQ."""
        from hooklens.viz.curves import lines
        from hooklens.viz.small_multiples import panels

        values = {"interpolated": self.errors, "line between the ends": self.straight}
        way = lines(values, x=self.alphas, title="Error", x_title="share of the construction", y_title="squared error")
        return panels([way, self.trained.figure()])


def weight_products(model: HookedTransformer) -> WeightProducts:
    """The products of weights that are the model's function, of a model of one layer and one head of linear attention.

    >>> from hooklens.plugins.algorithmic.icl.learners import GradientDescent
    >>> weight_products(construct_descent(GradientDescent(3.0), 2, 3)).values      # y times rate / n_points
    tensor([0., 0., 1.])
    """
    need_hooked(model, "products of weights")
    _need_bilinear(model)
    with torch.no_grad():
        attn: Any = model.blocks[0].attn
        embed, read = model.embed.weight.T, model.W_U[:, 0]
        return WeightProducts(
            scores=embed @ attn.W_K[0] @ attn.W_Q[0].mT @ embed.mT / attn.scale,
            values=embed @ attn.W_V[0] @ attn.W_O[0] @ read,
            direct=embed @ read,
        )


def interpolate_weights(
    model: HookedTransformer,
    prompts: RegressionPrompts,
    learner: Learner,
    *,
    alphas: Sequence[float] = tuple(i / 10 for i in range(11)),
) -> WeightInterpolation:
    """Do weights between the trained ones and those of a learner's construction also solve the task?

    W_KQ and W_PV have a scale in common that can move from one to the other. As published, the trained W_KQ is divided
    by the mean of its diagonal and W_PV multiplied by it; the mean is over the coordinates of the point, since the
    construction has 0 for the answer's. The published point is the midpoint.

    >>> import hooklens as hl
    >>> from hooklens.plugins.algorithmic.icl.learners import GradientDescent
    >>> from hooklens.plugins.algorithmic.icl.regression_prompts import draw_prompts
    >>> prompts, step = draw_prompts(hl.data.in_context_regression(d=2, n_points=5), 9), GradientDescent(4.0)
    >>> round(interpolate_weights(construct_descent(step, 2, 5), prompts, step).barrier, 6)
    0.0

    Reference: von Oswald et al. (2023), appendix A.3, equations 9 and 10.
    """
    need_regression(model, prompts)
    if prompts.interleaved:
        raise InputError(
            "the construction reads x and y in one token, and in these prompts they have tokens of their own"
        )
    places = [real("alphas", alpha) for alpha in several("alphas", alphas)]
    if len(places) < 3 or places[0] != 0 or places[-1] != 1 or places != sorted(places):
        raise InputError(f"alphas ascend from 0 to 1 with a number between, got {places}")
    trained = weight_products(model).rescaled()
    if not bool(trained.scores.isfinite().all()):
        raise InputError("the diagonal of W_KQ has the mean 0, so that the trained weights cannot be rescaled by it")
    built = construct_descent(learner, prompts.d, prompts.n_points, dtype=model.dtype).to(model.device)
    # rescaled too: for gradient descent W_KQ is the identity already, with a matrix it is not
    constructed = weight_products(built).rescaled()
    prompts = prompts.to(model.W_U)
    tokens, target = prompts.tokens(), prompts.target

    def error(alpha: float) -> float:
        between = WeightProducts(
            scores=torch.lerp(trained.scores, constructed.scores, alpha),
            values=torch.lerp(trained.values, constructed.values, alpha),
            direct=torch.lerp(trained.direct, constructed.direct, alpha),
        )
        return float((between.answers(tokens) - target).square().mean())

    return WeightInterpolation(
        alphas=torch.tensor(places, dtype=model.dtype),
        errors=torch.tensor([error(alpha) for alpha in places], dtype=model.dtype),
        midpoint=error(0.5),
        zero=float(target.square().mean()),
        trained=trained,
        constructed=constructed,
    )


def _need_bilinear(model: HookedTransformer) -> None:
    """Raise unless the model is one layer of one head of linear attention and nothing else."""
    if problem := _beyond(model):
        raise InputError(
            "products of weights are the whole function of one layer with one head of linear attention, without norms, "
            f"biases, positions and MLP; this model has {problem}. Compare others by answers: compare_learners"
        )


def _beyond(model: HookedTransformer) -> str:
    """What the model has beyond one head of linear attention, in words."""
    cfg = model.cfg
    biased = any(name.endswith("bias") for name, _ in model.named_parameters())
    checks = {
        f"{cfg.n_layers} layers": cfg.n_layers != 1,
        f"{cfg.n_heads} heads": cfg.n_heads != 1,
        "an MLP": not cfg.attn_only,
        "norms": cfg.normalization_type is not None or cfg.qk_norm is not None,
        "positions": not isinstance(cfg.positional_embedding_type, NoPositions),
        "biases": biased,
        "token embeddings": not isinstance(cfg.embed, VectorEmbed),
        f"the mask {cfg.mask}": not isinstance(cfg.mask, NoMask | Causal),
        f"the scores {cfg.score_fn}": not isinstance(cfg.score_fn, LinearScore) or cfg.score_fn.soft_cap is not None,
        f"the block {cfg.block}": cfg.block.name != "pre",
    }
    return ", ".join(what for what, is_there in checks.items() if is_there)


def demo(model: HookedTransformer) -> WeightInterpolation | Needs:
    """Sixteen prompts of 4 points, if the model is one head of linear attention on vectors."""
    if problem := _beyond(model):
        return Needs(f"one layer with one head of linear attention on vectors and nothing else (there: {problem})")
    d = model.cfg.embed.d_in - 1
    step = best_step(uniform_moments(d), 4).learner()
    return interpolate_weights(model, draw_prompts(in_context_regression(d=d, n_points=4), 16), step)
