"""Calibration: does the model's confidence match its accuracy? Loss and entropy of every token; reliability diagram."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.errors import InputError
from hooklens.data.demo_prompts import demo_texts
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts
from hooklens.model.ids import show
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.lens.reading import (
    check_quiet,
    need_probabilities,
    one_length,
    packing,
    prompts_at_once,
    read_streams,
)
from hooklens.plugins.weights.needs import Needs, needs_tokens
from hooklens.results.result import Result, Table
from hooklens.results.statistics import DRAWS, mean_interval, null_p, quantiles

# Confidences that differ by less than so many roundings are one.
_ROUNDINGS = 64


@dataclass(frozen=True, eq=False)
class Calibration(Result):
    """Every next-token prediction on some texts, in nats, and the relation of confidence and accuracy.

    `loss` is the surprisal of the actual token, `entropy` that of the model's distribution, `confidence` the
    probability of its most likely token, and `correct` whether that token came. `unigram` is the loss of the texts' own
    token frequencies (fitted on the same texts: a real unigram model does worse), `uniform` is ln d_vocab. `null`
    contains the errors that a perfectly calibrated model with these confidences shows by chance.
    """

    loss: Float[Tensor, "batch predicted"]
    entropy: Float[Tensor, "batch predicted"]
    confidence: Float[Tensor, "batch predicted"]
    correct: Bool[Tensor, "batch predicted"]
    edges: Float[Tensor, "edge"]
    null: Float[Tensor, "draw"]
    unigram: float
    uniform: float
    str_tokens: list[list[str]]

    @property
    def bin(self) -> Int[Tensor, "batch predicted"]:
        """The bin of each prediction: of its confidence, between two `edges`."""
        return torch.bucketize(self.confidence, self.edges[1:-1])

    @property
    def counts(self) -> Float[Tensor, "batch bin"]:
        """The number of predictions of each text in each bin."""
        return self._sums(torch.ones_like(self.confidence))

    @property
    def expected_error(self) -> float:
        """|accuracy - confidence|, mean over predictions bin by bin (ECE)."""
        return float(binned_error(self._gaps().sum(0), self.loss.numel()))

    def expected_error_interval(self, level: float = 0.95, *, seed: int = 0) -> tuple[float, float]:
        """The interval of `expected_error`, from a bootstrap over texts; NaN for one text. It is biased upwards too."""
        gaps = self._gaps()
        if len(gaps) < 2:
            return float("nan"), float("nan")
        errors = binned_error(_resamples(gaps, seed) @ gaps, self.loss.numel())
        low, high = quantiles(errors, ((1 - level) / 2, (1 + level) / 2)).tolist()
        return low, high

    @property
    def p(self) -> float:
        """How often a calibrated model with these confidences shows an error as large by chance."""
        return float(null_p(torch.tensor(self.expected_error, dtype=self.null.dtype), self.null))

    @property
    def surplus(self) -> Float[Tensor, "batch"]:
        """Mean loss minus mean entropy of each text: 0 on average for a calibrated model, above it if overconfident."""
        return (self.loss - self.entropy).mean(1)

    def surplus_interval(self, level: float = 0.95) -> tuple[float, float]:
        """The interval of the mean surplus, from a bootstrap over texts; NaN for one text."""
        low, high = mean_interval(self.surplus, level=level)
        return float(low), float(high)

    def table(self, n: int | None = None) -> Table:
        """One row per bin: number of predictions, mean confidence, accuracy."""
        has, counts, sure, right = self._bins()
        rows = [
            (f"{self.edges[i]:.3f} to {self.edges[i + 1]:.3f}", int(count), float(s), float(r), float(r - s))
            for i, count, s, r in zip(has, counts, sure, right, strict=True)
        ]
        return Table(("confidence", "predictions", "mean confidence", "accuracy", "gap"), rows).head(n)

    def summary(self) -> Table:
        """The texts as a whole, each number with its reference value."""
        (low, high), chance = self.surplus_interval(), float(self.null.mean())
        accuracy, sure = float(self.correct.double().mean()), float(self.confidence.mean())
        rows = [
            ("loss", float(self.loss.mean()), f"unigram {self.unigram:.3f}, uniform {self.uniform:.3f}"),
            ("entropy", float(self.entropy.mean()), "equal to the loss if calibrated"),
            ("loss minus entropy", float(self.surplus.mean()), f"[{low:.3f}, {high:.3f}] contains 0 if calibrated"),
            ("accuracy", accuracy, f"mean confidence {sure:.3f}"),
            ("expected calibration error", self.expected_error, f"by chance {chance:.4f}, p {self.p:.3f}"),
        ]
        return Table(("quantity", "value", "read against"), rows)

    def top_tokens(self, k: int = 10) -> Table:
        """The `k` tokens with the largest surprisal."""
        rows = []
        for i in self.loss.flatten().argsort(descending=True, stable=True)[:k].tolist():
            text, position = i // self.loss.shape[1], i % self.loss.shape[1] + 1
            rows.append((repr(self.str_tokens[text][position]), text, position, float(self.loss.flatten()[i])))
        return Table(("token", "text", "position", "loss"), rows)

    def figure(self) -> Any:
        """Reliability diagram: accuracy against confidence, with intervals over texts and the diagonal."""
        from hooklens.viz.curves import lines

        has, _, sure, right = self._bins()
        chance = float(self.null.mean())
        title = f"Reliability: expected calibration error {self.expected_error:.4f} (by chance {chance:.4f})"
        return lines(
            {"model": right, "calibrated": sure},
            sure,
            {"model": self._accuracy_interval(has)} if len(self.loss) > 1 else None,
            title,
            x_title="confidence",
            y_title="accuracy",
        )

    def token_figure(self, text: int = 0) -> Any:
        """A text, each token coloured by its surprisal."""
        from hooklens.viz.tokens import token_strip

        values = torch.cat([self.loss.new_full((1,), float("nan")), self.loss[text]])
        return token_strip(self.str_tokens[text], values, title="surprisal (nats)", diverging=False)

    def _gaps(self) -> Float[Tensor, "batch bin"]:
        """Confidence minus correctness, summed over each text's predictions in each bin."""
        return self._sums(self.confidence - self.correct.to(self.confidence))

    def _sums(self, values: Float[Tensor, "batch predicted"]) -> Float[Tensor, "batch bin"]:
        return values.new_zeros(len(values), len(self.edges) - 1).scatter_add_(1, self.bin, values)

    def _bins(self) -> tuple[Int[Tensor, "filled"], Tensor, Tensor, Tensor]:
        """The bins that are not empty, with the count, the mean confidence and the accuracy of each."""
        has = self.counts.sum(0).nonzero().flatten()
        sums = (self.counts, self._sums(self.confidence), self._sums(self.correct.to(self.confidence)))
        counts, sure, right = (part.sum(0)[has] for part in sums)
        return has, counts, sure / counts, right / counts

    def _accuracy_interval(self, has: Int[Tensor, "filled"]) -> tuple[Tensor, Tensor]:
        """95 % intervals from a bootstrap over texts, for each bin that is not empty."""
        right, counts = (x[:, has] for x in (self._sums(self.correct.to(self.confidence)), self.counts))
        times = _resamples(right, seed=0)
        shares = (times @ right) / (times @ counts)
        low, high = shares.nanquantile(shares.new_tensor([0.025, 0.975]), dim=0)
        return low, high


def _resamples(values: Float[Tensor, "batch bin"], seed: int) -> Float[Tensor, "draw batch"]:
    """How often each bootstrap draw contains each text."""
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=seeded(seed))
    times = torch.zeros(drawn.shape, dtype=values.dtype)
    return times.scatter_add_(1, drawn, torch.ones_like(drawn).to(times)).to(values.device)


def measure_calibration(
    model: HookedTransformer,
    tokens: Prompts | PromptPairs,
    *,
    n_bins: int = 15,
    adaptive: bool = True,
    seed: int = 0,
) -> Calibration:
    """Does the model's confidence match its accuracy? Loss and entropy of every next token, reliability, and its error.

    >>> from hooklens.testing import tiny_model
    >>> tokens = torch.randint(11, (20, 16), generator=torch.Generator().manual_seed(0))
    >>> found = measure_calibration(tiny_model(), tokens)
    >>> found.loss.shape, round(found.uniform, 4)          # batch predicted
    (torch.Size([20, 15]), 2.3979)

    `tokens` are texts of one length; `PromptPairs` stand for their clean prompts. Bins contain equally many predictions
    (`adaptive`) or are equally wide. The error is never 0, even for a perfect model, because the accuracy in a bin
    varies by chance; the error by chance alone is reported with it, drawn with `seed`.

    Reference: Guo et al. (2017), "On Calibration of Modern Neural Networks", equation 3; Nguyen and O'Connor (2015),
    "Posterior calibration and exploratory analysis for natural language processing models" (adaptive bins).
    """
    need_probabilities(model, "measure_calibration")
    whole("n_bins", n_bins, 1)
    ids = one_length(model, tokens)
    if ids.shape[1] < 2:
        raise InputError("calibration predicts each token from the ones before it: texts need at least two tokens")
    check_quiet(model)
    loss, entropy, confidence, correct = _predictions(model, ids)
    edges = _edges(confidence, n_bins, adaptive)
    frequency = torch.bincount(ids[:, 1:].flatten()).to(loss) / ids[:, 1:].numel()
    unigram = -torch.special.xlogy(frequency, frequency).sum()
    return Calibration(
        loss=loss,
        entropy=entropy,
        confidence=confidence,
        correct=correct,
        edges=edges,
        null=_by_chance(confidence, edges, seed),
        unigram=float(unigram),
        uniform=float(torch.tensor(model.cfg.d_vocab_out, dtype=torch.float64).log()),
        str_tokens=[show(model, row) for row in ids],
    )


def binned_error(gaps: Float[Tensor, "*draw bin"], n: int) -> Float[Tensor, "*draw"]:
    """The expected calibration error, from the sum of confidence minus correctness in each bin.

    >>> binned_error(torch.tensor([0.5, -1.0]), 10).item()
    0.15000...
    """
    return gaps.abs().sum(-1) / n


def _predictions(model: HookedTransformer, ids: Int[Tensor, "batch pos"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, entropy, confidence and correctness of every token except the first."""
    parts_read = []
    with packing(ids.numel()):
        for some in prompts_at_once(model, ids):
            with torch.no_grad():
                stream = model(some, stop_at_layer=model.cfg.n_layers)[:, :-1].flatten(0, 1)
            targets = some[:, 1:].flatten()
            reading = read_streams(model, stream[None], targets[:, None], k=1)
            parts = (-reading.log_prob[0, :, 0], reading.entropy[0], reading.top_log_probs[0, :, 0].exp())
            parts_read.append([part.view(len(some), -1) for part in (*parts, reading.top[0, :, 0] == targets)])
    loss, entropy, confidence, correct = (torch.cat(parts) for parts in zip(*parts_read, strict=True))
    return loss, entropy, confidence.clamp_max(1.0), correct


def _edges(confidence: Tensor, n_bins: int, adaptive: bool) -> Float[Tensor, "edge"]:
    """Bin edges from 0 to 1; adaptive ones lie between a quantile and the next confidence, with equal edges merged.

    An edge at the quantile itself would let a kernel's last bits decide which of two bins a prediction falls into.
    """
    at = torch.linspace(0, 1, n_bins + 1, dtype=confidence.dtype, device=confidence.device)
    if not adaptive:
        return at
    ordered = confidence.flatten().sort().values
    inner = ordered[(at[1:-1] * len(ordered)).long().clamp_max(len(ordered) - 1)]
    after = torch.searchsorted(ordered, inner + _ROUNDINGS * torch.finfo(ordered.dtype).eps, right=True)
    beyond = torch.cat([ordered, at[-1:]])[after]
    return torch.cat([at[:1], (ordered[after - 1] + beyond) / 2, at[-1:]]).unique()


def _by_chance(confidence: Tensor, edges: Tensor, seed: int, draws: int = 200) -> Float[Tensor, "draw"]:
    """Errors of a model that is perfectly calibrated."""
    generator = seeded(seed)
    flat = confidence.flatten()
    which = torch.bucketize(flat, edges[1:-1])
    errors = []
    for _ in range(draws):
        right = torch.rand(len(flat), generator=generator, dtype=torch.float64).to(flat) < flat
        gaps = flat.new_zeros(len(edges) - 1).index_add_(0, which, flat - right.to(flat))
        errors.append(binned_error(gaps, len(flat)))
    return torch.stack(errors)


def demo(model: HookedTransformer) -> Calibration | Needs:
    """Twelve short sentences; without a tokenizer, random token numbers, which no model can predict."""
    return needs_tokens(model) or measure_calibration(model, demo_texts(model, 12, 16))
