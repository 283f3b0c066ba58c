"""The result of a coefficient sweep: effect and fluency at every coefficient, with random directions as a control."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import OutOfRange
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, middle, null_p, q_values

Ends = tuple[Float[Tensor, "coefficient"], Float[Tensor, "coefficient"]]


@dataclass(frozen=True, eq=False)
class CoefficientSweep(Result):
    """Effect and fluency at every coefficient, for the direction and for random directions of the same length.

    `metric` is measured on the prompts, and `base_per_prompt` without steering. `continuation_loss` is the loss of the
    unsteered model on the text that the steered model writes, in nats per token, and `neutral_loss` is the loss of the
    steered model on neutral text: both rise if steering breaks the model. `repeats` is the share of two-token sequences
    in a continuation that occurred in it before: a text in a loop has a low loss under any model.
    """

    ranked_by = "size of the effect"
    terms = {
        "random low": "the lower end of the effects of random directions of the same length",
        "random high": "the upper end",
        "neutral, random": "the perplexity of neutral text under random directions",
    }

    coefficients: Float[Tensor, "coefficient"]
    metric: Float[Tensor, "coefficient prompt"]
    base_per_prompt: Float[Tensor, "prompt"]
    random_metric: Float[Tensor, "draw coefficient prompt"]
    continuation_loss: Float[Tensor, "coefficient prompt"]
    base_continuation_loss: Float[Tensor, "prompt"]
    random_continuation_loss: Float[Tensor, "written coefficient prompt"]
    neutral_loss: Float[Tensor, "coefficient text"]
    base_neutral_loss: Float[Tensor, "text"]
    random_neutral_loss: Float[Tensor, "draw coefficient text"]
    repeats: Float[Tensor, "coefficient prompt"]
    base_repeats: Float[Tensor, "prompt"]
    prompts: list[str]
    texts: list[list[str]]
    base_texts: list[str]
    group: Int[Tensor, "prompt"]
    site: str
    positions: str
    neutral: str

    @property
    def effect(self) -> Float[Tensor, "coefficient"]:
        """The change of the metric under steering, mean over prompts."""
        return (self.metric - self.base_per_prompt).mean(1)

    @property
    def random_effect(self) -> Float[Tensor, "draw coefficient"]:
        """The same for each random direction."""
        return (self.random_metric - self.base_per_prompt).mean(2)

    def interval(self, level: float = 0.95) -> Ends:
        """The interval of `effect`, by a bootstrap over groups of prompts."""
        return mean_interval((self.metric - self.base_per_prompt).T, group=self.group, level=level)

    def random_band(self, level: float = 0.95) -> Ends:
        """The interval of the effects of random directions."""
        return middle(self.random_effect, level)

    @property
    def p(self) -> Float[Tensor, "coefficient"]:
        """How often a random direction changes the metric as much, in either direction; 1 at coefficient 0."""
        return null_p(self.effect.abs(), self.random_effect.abs())

    @property
    def q(self) -> Float[Tensor, "coefficient"]:
        """`p` of the coefficients, as false discovery rates; coefficient 0 is not a test."""
        tested = self.coefficients != 0
        return q_values(torch.where(tested, self.p, torch.nan)).where(tested, 1.0)

    @property
    def perplexity(self) -> Float[Tensor, "coefficient"]:
        """The perplexity of the steered model's text under the unsteered model."""
        return self.continuation_loss.mean(1).exp()

    @property
    def neutral_perplexity(self) -> Float[Tensor, "coefficient"]:
        """The perplexity of neutral text under the steered model."""
        return self.neutral_loss.mean(1).exp()

    def table(self, n: int | None = None) -> Table:
        """One row per coefficient: effect, perplexity, and the beginning of the first prompt's continuation."""
        neutral = self.random_neutral_loss.mean((0, 2)).exp()
        (low, high), (least, most) = self.interval(), self.random_band()
        columns = {
            "coefficient": self.coefficients,
            "effect": self.effect,
            "low": low,
            "high": high,
            "random low": least,
            "random high": most,
            "q": self.q,
            "perplexity": self.perplexity,
            "of neutral text": self.neutral_perplexity,
            "neutral, random": neutral,
            "repeats": self.repeats.mean(1),
            f"after {self.prompts[0][-24:]!r}": [text[0][:48] for text in self.texts],
        }
        return Table(tuple(columns), list(zip(*columns.values(), strict=True))).head(n)

    @property
    def ranking(self) -> Float[Tensor, "coefficient"]:
        """The size of each effect."""
        return self.effect.abs()

    def samples(self, prompt: int = 0) -> Table:
        """The model's continuation of one prompt at every coefficient."""
        if prompt not in range(-len(self.prompts), len(self.prompts)):
            raise OutOfRange(f"prompt is from 0 to {len(self.prompts) - 1}, got {prompt!r:.40}")
        rows: list[tuple] = [(0.0, self.base_texts[prompt], self.base_continuation_loss[prompt].exp())]
        for value, text, loss in zip(self.coefficients, self.texts, self.continuation_loss, strict=True):
            rows.append((value, text[prompt], loss[prompt].exp()))
        return Table(("coefficient", "continuation", "perplexity"), rows)

    def figure(self) -> Any:
        """Effect (top) and perplexity (bottom) against the coefficient, with the bands of random directions."""
        from hooklens.viz.curves import lines
        from hooklens.viz.small_multiples import panels

        x, bands = self.coefficients, {"this direction": self.interval(), "random directions": self.random_band()}
        values = {"this direction": self.effect, "random directions": self.random_effect.mean(0)}
        above = lines(values, x, bands, "Effect on the metric", x_title="coefficient", y_title="change of the metric")
        random = self.random_neutral_loss.mean(2)
        costs = {
            "its text, unsteered model": self.perplexity,
            "neutral text, steered model": self.neutral_perplexity,
            "neutral text, random directions": random.mean(0).exp(),
            "its text, random directions": self.random_continuation_loss.mean((0, 2)).exp(),
            "unsteered": self.base_continuation_loss.mean().exp().expand(len(x)),
        }
        low, high = middle(random)
        shaded = {"neutral text, random directions": (low.exp(), high.exp())}
        below = lines(costs, x, shaded, "Cost in fluency", x_title="coefficient", y_title="perplexity")
        below.update_yaxes(type="log", dtick="D2")
        return panels([above, below])
