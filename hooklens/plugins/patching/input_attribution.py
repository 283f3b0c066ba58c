"""Gradients by token: gradient x input and integrated gradients on the embeddings, with their sanity checks."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompts import Prompts
from hooklens.plugins.patching.embedding_path import EmbeddingPath
from hooklens.plugins.patching.quadrature import Integral, integrate
from hooklens.plugins.patching.weight_randomisation import WeightRandomisation, randomise
from hooklens.results.result import Result, Table

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_MISSES = 10  # times the difference of the metrics, from which on an integral is refused

PerToken = Float[Tensor, "prompt pos"]
PerPrompt = Float[Tensor, "prompt"]


@dataclass(frozen=True, eq=False)
class InputAttribution(Result):
    """One number a token, the metric at the prompt and at the baseline, and the sanity check of the same method.

    Where `per_token` sums to the difference of the two metrics, every bit of it is accounted for: `residual` is what is
    missing. Gradient x input does not promise that; integrated gradients do, up to their steps.
    """

    ranked_by = "attribution"

    per_token: PerToken
    metric: PerPrompt
    baseline_metric: PerPrompt
    str_tokens: list[list[str]]
    method: str
    baseline: str
    n_gradients: int
    sanity: WeightRandomisation | None

    @property
    def gap(self) -> PerPrompt:
        """The metric of the prompt minus that of the baseline: what is to be attributed."""
        return self.metric - self.baseline_metric

    @property
    def residual(self) -> PerPrompt:
        """The sum over tokens minus the gap: 0 where the attribution is complete."""
        return self.per_token.sum(1) - self.gap

    @property
    def incompleteness(self) -> float:
        """The mean size of the residual as a share of the mean size of the gap."""
        return float(self.residual.abs().mean() / self.gap.abs().mean())

    def order(self) -> list[tuple[int, int]]:
        """(prompt, position) of every token, the largest attribution first, whatever its sign."""
        flat = self.per_token.abs().flatten().argsort(descending=True, stable=True).tolist()
        return [divmod(i, self.per_token.shape[1]) for i in flat]

    def table(self, n: int | None = 20) -> Table:
        """The tokens of largest attribution, over all prompts."""
        rows = [(i, j, self.str_tokens[i][j], float(self.per_token[i, j])) for i, j in self.order()[:n]]
        return Table(("prompt", "position", "token", self.method), rows)

    def figure(self) -> Any:
        """Bars over the tokens of one prompt; a heat map of several."""
        from hooklens.viz.figures import bars, heatmap

        title = f"{self.method}, baseline {self.baseline}: {self.incompleteness:.1%} of the difference is missing"
        if len(self.per_token) == 1:
            return bars(self.per_token[0], labels=self.str_tokens[0], title=title, y_title="attribution")
        return heatmap(
            self.per_token,
            title=title,
            x_title="position",
            y_title="prompt",
            hover=self.str_tokens,
            colourbar="attribution",
        )


def gradient_x_input(
    model: "HookedTransformer", prompts: Prompts, metric: Any, *, stages: int = 3, seed: int = 0
) -> InputAttribution:
    """Which tokens would the metric miss most, to first order? Embedding times gradient, summed over its dimensions.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.metrics import log_prob
    >>> model = tiny_model()
    >>> found = gradient_x_input(model, torch.tensor([[1, 2, 3, 4]]), log_prob(model, answer=5))
    >>> found.per_token.shape, found.sanity.signed.shape          # prompt pos; stage prompt
    (torch.Size([1, 4]), torch.Size([3, 1]))

    A local statement: how the metric moves when an embedding shrinks a little, not what happens without the token. The
    residual is that against the zero embedding. `stages` is how often the weight-randomisation check looks (0: never).

    Reference: Simonyan et al. (2013), "Deep Inside Convolutional Networks", section 3; Shrikumar et al. (2016), "Not
    Just a Black Box" (times input).
    """
    path = EmbeddingPath.of(model, prompts, metric, "zero")
    value, slope = path.slopes(model, torch.ones(1, len(path.tokens)))
    sanity = randomise(model, path.at_end, stages=stages, seed=seed) if stages else None
    empty = path.metric_at_baseline(model)
    return InputAttribution(
        per_token=slope[0],
        metric=value[0],
        baseline_metric=empty,
        str_tokens=path.str_tokens,
        method="gradient x input",
        baseline=path.name,
        n_gradients=1,
        sanity=sanity,
    )


def integrated_gradients(
    model: "HookedTransformer",
    prompts: Prompts,
    metric: Any,
    *,
    baseline: str | Prompts,
    steps: int = 64,
    stages: int = 3,
    seed: int = 0,
) -> InputAttribution:
    """Which tokens account for the metric's difference from a baseline? Gradients gathered on the straight way there.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.metrics import log_prob
    >>> model = tiny_model(dtype=torch.float64); clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
    >>> found = integrated_gradients(model, clean, log_prob(model, answer=5), baseline=corrupted)
    >>> found.per_token[0, 0].item(), found.incompleteness < 1e-4      # a token that does not differ has no share
    (0.0, True)

    `baseline` is a choice that decides the answer: other prompts of the same length (their embeddings), "zero", or
    "mean" (of all embeddings; both are inputs that the model never saw). The way is straight in the embeddings and
    leads through points that are no token. `steps` is the number of gradients a prompt; they are taken where the metric
    changes in a way that the gradients so far do not explain, and what stays unexplained is the `residual`: look at it
    first; one of ten times the difference is refused. `stages` is how often the weight-randomisation check looks (0:
    never), each as dear as the method.

    Reference: Sundararajan et al. (2017), "Axiomatic Attribution for Deep Networks", section 3 (equation 1;
    completeness: proposition 1).
    """
    path = EmbeddingPath.of(model, prompts, metric, baseline)

    def attribute(model: "HookedTransformer") -> PerToken:
        return integrate(partial(path.slopes, model), len(path.tokens), steps).per_token

    found = integrate(partial(path.slopes, model), len(path.tokens), steps)
    _check_converged(found, path.name)
    sanity = randomise(model, attribute, stages=stages, seed=seed) if stages else None
    said = (path.str_tokens, "integrated gradients", path.name, found.n_nodes, sanity)
    return InputAttribution(found.per_token, found.end, found.start, *said)


def _check_converged(found: Integral, baseline: str) -> None:
    """Refuse an integral that misses many times what it should sum to: such numbers are those of a few steep places."""
    gap = (found.end - found.start).abs()
    missing = (found.per_token.sum(1) - (found.end - found.start)).abs()
    # a difference of almost 0 is missed by many times its size when all is well
    much = torch.minimum(found.per_token.abs().sum(1) / _MISSES, found.end.abs() + found.start.abs())
    wrong = ((missing > _MISSES * gap) & (missing > much)).nonzero().flatten().tolist()
    if wrong:
        at = wrong[0]
        raise InputError(
            f"integrated gradients of prompt {at} from the baseline {baseline} did not converge in {found.n_nodes} "
            f"gradients: the metrics differ by {float(gap[at]):.3g}, and the sum over tokens misses that by "
            f"{float(missing[at]):.3g}; give prompts as the baseline (next to the zero embedding a norm divides by "
            "almost 0), or more steps"
        )


def demo(model: "HookedTransformer") -> InputAttribution:
    """Integrated gradients between two short prompts that differ in one token; numbers without a tokenizer."""
    pairs = demo_pairs(model)
    metric = pairs.metric_of(model)
    return integrated_gradients(model, pairs.clean, metric, baseline=pairs.corrupted, steps=17, stages=2)
