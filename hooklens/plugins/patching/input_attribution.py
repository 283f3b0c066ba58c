"""Gradients by token: gradient x input and integrated gradients on the embeddings, with their sanity checks."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompts import Prompts, Row, reads_vectors, rows_of
from hooklens.metrics import ReadingMetric, need_metric
from hooklens.model.ids import show
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.backward import backward_rows, gradients_of, need_backward
from hooklens.plugins.patching.quadrature import Integral, integrate
from hooklens.plugins.patching.weight_randomisation import WeightRandomisation, randomise
from hooklens.results.result import Result, Table
from hooklens.sweeps.measure import Reader

_MISSES = 10  # times the difference of the metrics, from which on an integral is refused
_WORDS = ("zero", "mean")  # baselines that are no prompts

PerToken = Float[Tensor, "prompt pos"]
PerPrompt = Float[Tensor, "prompt"]


@dataclass(frozen=True)
class EmbeddingPath:
    """The straight line of embeddings from a baseline (0) to the prompts (1).

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.metrics import log_prob
    >>> model = tiny_model()
    >>> path = EmbeddingPath.of(model, [[1, 2, 3]], log_prob(model, answer=4), "zero")
    >>> value, slope = path.slopes(model, torch.tensor([[0.5], [1.0]]))
    >>> value.shape, slope.shape                 # node prompt; node prompt pos
    (torch.Size([2, 1]), torch.Size([2, 1, 3]))
    """

    tokens: Shaped[Tensor, "prompt pos *d_in"]
    baseline: str | Shaped[Tensor, "prompt pos *d_in"]
    metric: Any
    str_tokens: list[list[str]]

    @classmethod
    def of(cls, model: HookedTransformer, prompts: Prompts, metric: Any, baseline: Any) -> "EmbeddingPath":
        need_backward(model, "an attribution to tokens")
        need_metric(metric)
        if reads_vectors(model) and isinstance(baseline, str) and baseline == "mean":
            raise InputError(
                "baseline='mean' is the mean of all token embeddings, and this model reads vectors; give 'zero' (zero "
                "vectors), or vectors of the prompts' shape such as their mean"
            )
        tokens = _of_one_length(rows_of(model, prompts, "prompts"))
        if not isinstance(baseline, str) or baseline not in _WORDS:
            baseline = _of_one_length(rows_of(model, baseline, "baseline"))
            if baseline.shape != tokens.shape:
                raise InputError(
                    f"a baseline holds one prompt of the same length for each, got {list(baseline.shape)} "
                    f"{'vectors' if reads_vectors(model) else 'tokens'} for {list(tokens.shape)}; or 'zero' or 'mean'"
                )
        return cls(tokens, baseline, metric, [show(model, row) for row in tokens])

    @property
    def name(self) -> str:
        """What the baseline is called."""
        return "other prompts" if isinstance(self.baseline, Tensor) else self.baseline

    def slopes(
        self, model: HookedTransformer, at: Float[Tensor, "node prompt"]
    ) -> tuple[Float[Tensor, "node prompt"], Float[Tensor, "node prompt pos"]]:
        """The metric at these places of the line, and its slope along it, token by token."""
        start, step = self._ends(model)
        n_at_once = 1  # a plain function must see its prompts together, in order
        if isinstance(self.metric, ReadingMetric):
            n_at_once = max(1, backward_rows(model, self.tokens.shape[1]) // len(self.tokens))
        parts = [self._some(model, start, step, some) for some in at.split(n_at_once)]
        slopes = torch.cat([slope for _, slope in parts])
        if not bool(slopes.isfinite().all()):
            raise InputError(
                "the gradient is not finite on the way from the baseline (at the zero embedding a norm without biases "
                "has none); use baseline='mean', or other prompts"
            )
        return torch.cat([value for value, _ in parts]), slopes

    @torch.no_grad()
    def metric_at_baseline(self, model: HookedTransformer) -> PerPrompt:
        """The metric where the line begins; no gradient is asked for there, which may not be finite."""
        return Reader(model, self.metric, self._stream(model, self._ends(model)[0])).base

    def _ends(self, model: HookedTransformer) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x = _embedded(model, self.tokens)
            if isinstance(self.baseline, Tensor):
                start = _embedded(model, self.baseline)
            elif self.baseline == "zero" and reads_vectors(model):
                start = model.embed(torch.zeros_like(self.tokens))  # an embedding may have a bias
            elif self.baseline == "zero":
                start = torch.zeros_like(x)
            else:
                start = model.embed(torch.arange(model.cfg.d_vocab, device=x.device)[None])[0].mean(0).expand_as(x)
        return start, x - start

    def _some(self, model: HookedTransformer, start: Tensor, step: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        n, metric = len(at), self.metric
        if isinstance(metric, ReadingMetric):
            metric = metric.pairs(torch.arange(len(self.tokens)).repeat(n))
        with torch.enable_grad():
            x = (start + at.to(step)[..., None, None] * step).flatten(0, 1).requires_grad_()
            values, (grad,) = gradients_of(model, metric, self._stream(model, x, n), [x])
        return values.view(n, -1), (grad.unflatten(0, (n, -1)) * step).sum(-1).to(values)

    def _stream(self, model: HookedTransformer, x: Tensor, n: int = 1) -> Tensor:
        """The stream that leaves the last block of the prompts, `n` times, with other embeddings."""
        write, tokens = ("hook_embed", lambda act, hook: x), self.tokens.repeat(n, *[1] * (self.tokens.ndim - 1))
        return model.run_with_hooks(tokens, fwd_hooks=[write], stop_at_layer=model.cfg.n_layers)

    def at_end(self, model: HookedTransformer) -> PerToken:
        """Gradient x input: the slope at the prompts themselves."""
        return self.slopes(model, torch.ones(1, len(self.tokens)))[1][0]


def _embedded(
    model: HookedTransformer, tokens: Shaped[Tensor, "prompt pos *d_in"]
) -> Float[Tensor, "prompt pos d_model"]:
    """What `hook_embed` holds, other people's edits included."""
    return model.run_with_cache(tokens, names="hook_embed", stop_at_layer=0)[1]["hook_embed"]


def _of_one_length(rows: list[Row]) -> Shaped[Tensor, "prompt pos *d_in"]:
    if len({len(row) for row in rows}) > 1:
        lengths = sorted({len(row) for row in rows})
        raise InputError(f"tokens are attributed prompt by prompt of one length, got {lengths}; take each length apart")
    return torch.stack(rows)


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
    model: HookedTransformer, prompts: Prompts, metric: Any, *, stages: int = 3, seed: int = 0
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
    return InputAttribution(
        per_token=slope[0],
        metric=value[0],
        baseline_metric=path.metric_at_baseline(model),
        str_tokens=path.str_tokens,
        method="gradient x input",
        baseline=path.name,
        n_gradients=1,
        sanity=randomise(model, path.at_end, stages=stages, seed=seed) if stages else None,
    )


def integrated_gradients(
    model: HookedTransformer,
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
    "mean" (of all embeddings; both are inputs that the model never saw). A model that reads vectors takes other vectors
    or "zero" (zero vectors). The way is straight in the embeddings and
    leads through points that are no token. `steps` is the number of gradients a prompt; they are taken where the metric
    changes in a way that the gradients so far do not explain, and what stays unexplained is the `residual`: look at it
    first; one of ten times the difference is refused. `stages` is how often the weight-randomisation check looks (0:
    never), each as dear as the method.

    Reference: Sundararajan et al. (2017), "Axiomatic Attribution for Deep Networks", section 3 (equation 1;
    completeness: proposition 1).
    """
    path = EmbeddingPath.of(model, prompts, metric, baseline)

    def integral(model: HookedTransformer) -> Integral:
        return integrate(partial(path.slopes, model), len(path.tokens), steps)

    whole = integral(model)
    _check_converged(whole, path.name)
    sanity = randomise(model, lambda copy: integral(copy).per_token, stages=stages, seed=seed) if stages else None
    return InputAttribution(
        per_token=whole.per_token,
        metric=whole.end,
        baseline_metric=whole.start,
        str_tokens=path.str_tokens,
        method="integrated gradients",
        baseline=path.name,
        n_gradients=whole.n_nodes,
        sanity=sanity,
    )


def _check_converged(whole: Integral, baseline: str) -> None:
    """Refuse an integral that misses many times what it should sum to: such numbers are those of a few steep places."""
    gap = whole.end - whole.start
    missing = (whole.per_token.sum(1) - gap).abs()
    # a difference of almost 0 is missed by many times its size when all is well
    much = torch.minimum(whole.per_token.abs().sum(1) / _MISSES, whole.end.abs() + whole.start.abs())
    wrong = ((missing > _MISSES * gap.abs()) & (missing > much)).nonzero().flatten().tolist()
    if wrong:
        at = wrong[0]
        raise InputError(
            f"integrated gradients of prompt {at} from the baseline {baseline} did not converge in {whole.n_nodes} "
            f"gradients: the metrics differ by {float(gap[at].abs()):.3g}, and the sum over tokens misses that by "
            f"{float(missing[at]):.3g}; give prompts as the baseline (next to the zero embedding a norm divides by "
            "almost 0), or more steps"
        )


def demo(model: HookedTransformer) -> InputAttribution:
    """Integrated gradients between two short prompts that differ in one token; numbers without a tokenizer."""
    pairs = demo_pairs(model)
    metric = pairs.metric_of(model)
    return integrated_gradients(model, pairs.clean, metric, baseline=pairs.corrupted, steps=17, stages=2)
