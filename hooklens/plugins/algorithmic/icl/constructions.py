"""Transformers with weights set by hand so that their forward pass is gradient descent."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooklens.core.arguments import check_target, whole
from hooklens.core.errors import ArgumentError, WrongType
from hooklens.model.config import Allowed, Biases, HookedTransformerConfig, MaskPart, Positions, VectorEmbed
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.icl.learners import GDPlusPlus, GradientDescent, Learner, PreconditionedStep

Step = tuple[Tensor, float, float]  # the matrix between query and key, rate and gamma of a layer


@dataclass(frozen=True)
class FirstKeys(MaskPart):
    """Every query attends to the first `n_points` tokens: the examples see each other, and nothing sees the query.

    A saved model with this mask loads once this module is imported. Reference: Ahn et al. (2023), the mask M.
    """

    name = "first_keys"
    causal = False
    n_points: int = 1

    def allows(self, query_pos: Positions, key_pos: Positions) -> Allowed:
        return (key_pos < self.n_points) & (query_pos == query_pos)


def construct_descent(
    learner: Learner, d: int, n_points: int, *, dtype: torch.dtype = torch.float32, n_ctx: int | None = None
) -> HookedTransformer:
    """A transformer of linear attention whose prediction equals the learner's, one layer a step.

    Tokens are (x_i, y_i). In every layer the attention score is x_i^T P x_j (P = I for gradient descent), and the head
    adds -gamma x_i and -rate y_i: examples keep the residual of their answer, and the query, which starts at 0, sums up
    minus the prediction. The unembedding reads minus the last coordinate. The division of scores by sqrt(d_head), and
    that by the number of examples (`learner.mean`), are weights.

    >>> import hooklens as hl
    >>> from hooklens.plugins.algorithmic.icl.regression_prompts import draw_prompts, predict
    >>> prompts = draw_prompts(hl.data.in_context_regression(d=2, n_points=5), 4)
    >>> learner = GradientDescent((3.0, 2.0))
    >>> torch.allclose(predict(construct_descent(learner, 2, 5), prompts), learner.predict(prompts), atol=1e-6)
    True

    With several layers the examples attend to each other and not to the query (`FirstKeys`): under a causal mask each
    would descend on those before it alone, and without a mask on the query's partial answer too. A single layer needs
    no mask, and with `mean=False` it works at every length up to `n_ctx`.

    Reference: von Oswald et al. (2023), proposition 1 and appendix A.10 (GD++); Ahn et al. (2023), theorem 1 (P).
    """
    steps = _steps(learner, whole("d", d, 1))
    check_target(None, dtype)
    n_points = whole("n_points", n_points, 1)
    n_ctx = n_points + 1 if n_ctx is None else whole("n_ctx", n_ctx, 1)
    if n_ctx <= n_points:
        raise ArgumentError("{n_ctx} is at least {n_points} and a query, {0} tokens; got {1}", n_points + 1, n_ctx)
    share = 1 / n_points if getattr(learner, "mean", True) else 1.0
    model = _blank(len(steps), d, n_points, n_ctx).to(dtype)
    blocks: Any = model.blocks
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(d + 1))
        for block, (matrix, rate, gamma) in zip(blocks, steps, strict=True):
            attn = block.attn
            attn.W_Q[0, :d, :d] = matrix.to(dtype) * attn.scale
            attn.W_K[0, :d, :d] = torch.eye(d)
            attn.W_V[0] = torch.eye(d + 1)
            attn.W_O[0] = -share * torch.diag(torch.tensor([gamma] * d + [rate], dtype=torch.float64)).to(dtype)
        model.W_U[d, 0] = -1.0
    return model


def _steps(learner: Learner, d: int) -> list[Step]:
    eye = torch.eye(d, dtype=torch.float64)
    if isinstance(learner, PreconditionedStep):
        learner.need_coordinates(d)
        return [(learner.matrix, 1.0, 0.0)]
    if isinstance(learner, GDPlusPlus):
        return [(eye, rate, gamma) for rate, gamma in zip(learner.rates, learner.gammas, strict=True)]
    if isinstance(learner, GradientDescent):
        return [(eye, rate, 0.0) for rate in learner.rates]
    raise WrongType(
        "a layer of linear attention does a step of GradientDescent, GDPlusPlus or PreconditionedStep; "
        f"got {learner!r:.80}"
    )


def _blank(n_layers: int, d: int, n_points: int, n_ctx: int) -> HookedTransformer:
    """Attention without softmax, norms, biases, positions and MLPs; every weight is 0."""
    cfg = HookedTransformerConfig(
        n_layers=n_layers,
        d_model=d + 1,
        n_ctx=n_ctx,
        n_heads=1,
        d_vocab=1,
        d_vocab_out=1,
        attn_only=True,
        normalization_type=None,
        positional_embedding_type="none",
        mask="none" if n_layers == 1 else FirstKeys(n_points),
        score_fn="linear",
        embed=VectorEmbed(d_in=d + 1),
        biases=Biases(qkv=False, o=False, mlp=False),
        model_name="constructed descent",
    )
    model = HookedTransformer(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model
