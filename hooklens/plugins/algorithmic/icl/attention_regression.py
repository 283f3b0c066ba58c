"""Is a head's attention at the query a linear function of the inner products of points?"""

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.errors import did_you_mean
from hooklens.data.regression import in_context_regression
from hooklens.model.config import VectorEmbed
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.icl.regression_prompts import (
    RegressionPrompts,
    draw_prompts,
    need_regression,
    widened_prompts,
)
from hooklens.plugins.algorithmic.icl.scored_vectors import read_scored_vectors
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result

AtQuery = Float[Tensor, "task point"]
_SHOWN = 24  # prompts of the heat maps


@dataclass(frozen=True, eq=False)
class AttentionRegression(Result):
    """Scores A = q k / scale of the query's row against <x_i, x_query>.

    The rows of the examples are left out: they do not answer. `r2` counts all variance of the scores; `r2_within` the
    variance between points of the same prompt, which is all that a softmax sees. `random_r2` is that of the products
    with points of another prompt, NaN where there is one prompt. The slope alone is no rate: the weights from values to
    the answer have the rest of it, and any factor can move from one to the other.
    """

    head: str
    slope: float
    intercept: float
    r2: float
    r2_within: float
    random_r2: float
    scores: AtQuery
    products: AtQuery

    def figure(self, model: str = "") -> Any:
        """Heat maps of the query's scores and of its inner products, one row a prompt; `model` names it in a title."""
        from hooklens.viz.figures import heatmap
        from hooklens.viz.small_multiples import panels

        axes: dict[str, Any] = {"x_title": "example", "y_title": "prompt"}
        shown, products = self.scores[:_SHOWN], self.products[:_SHOWN]
        title = f"Scores of {self.head} at the query" + f", {model}" * bool(model)
        scores = heatmap(shown, title=title, colourbar="score", **axes)
        title = "Inner products with the query"
        return panels([scores, heatmap(products, title=title, colourbar="product", **axes)])


def regress_attention(
    model: HookedTransformer, prompts: RegressionPrompts, *, layer: int = 0, head: int = 0
) -> AttentionRegression:
    """How well do inner products with the query explain the attention scores of a head?

    In one step of gradient descent the score is proportional to <x_i, x_query>: R^2 is 1. Of interleaved prompts the
    keys are the tokens of the answers, which an earlier layer may have given their point.

    >>> from hooklens.plugins.algorithmic.icl.constructions import construct_descent
    >>> from hooklens.plugins.algorithmic.icl.learners import GradientDescent
    >>> prompts = draw_prompts(in_context_regression(d=2, n_points=5), 30)
    >>> regression = regress_attention(construct_descent(GradientDescent(1.0), 2, 5), prompts)
    >>> round(regression.slope, 5), round(regression.r2, 5)
    (1.0, 1.0)

    Reference: von Oswald et al. (2023), proposition 1 and figure 9 (their products of weights, here on activations).
    """
    need_regression(model, prompts)
    if whole("layer", layer) >= model.cfg.n_layers or whole("head", head) >= model.cfg.n_heads:
        known = [f"L{i}H{j}" for i in range(model.cfg.n_layers) for j in range(model.cfg.n_heads)]
        raise did_you_mean("head", f"L{layer}H{head}", known)
    prompts = widened_prompts(model, prompts)
    vectors = read_scored_vectors(model, prompts.tokens().to(model.dtype), [layer])
    q, k = (part[:, head].to(prompts.query) for part in vectors[0])
    attn: Any = model.blocks[layer].attn
    at_query = (q[:, -1:] @ k.mT / attn.scale)[:, 0]
    scores = at_query[:, 1::2] if prompts.interleaved else at_query[:, :-1]
    products = (prompts.points @ prompts.query[:, :, None])[..., 0]
    slope, intercept, r2 = _line(products, scores)
    centred = [part - part.mean(1, keepdim=True) for part in (products, scores)]
    return AttentionRegression(
        head=f"L{layer}H{head}",
        slope=slope,
        intercept=intercept,
        r2=r2,
        r2_within=_line(*centred)[2],
        random_r2=_line(products.roll(1, 0), scores)[2] if len(prompts) > 1 else math.nan,
        scores=scores,
        products=products,
    )


def _line(x: AtQuery, y: AtQuery) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of the line of y on x, over all prompts; NaN where x or y is constant."""
    dx, dy = x - x.mean(), y - y.mean()
    covariance, square = (dx * dy).sum(), dx.square().sum()
    slope = covariance / square
    return float(slope), float(y.mean() - slope * x.mean()), float(covariance**2 / (square * dy.square().sum()))


def demo(model: HookedTransformer) -> AttentionRegression | Needs:
    """Sixteen prompts of 4 points, if the model reads vectors and answers with one number."""
    embed = model.cfg.embed
    if not isinstance(embed, VectorEmbed) or embed.d_in < 2 or model.cfg.d_vocab_out != 1 or model.cfg.n_ctx < 5:
        return Needs("vectors (x, y) as input and one output")
    return regress_attention(model, draw_prompts(in_context_regression(d=embed.d_in - 1, n_points=4), 16))
