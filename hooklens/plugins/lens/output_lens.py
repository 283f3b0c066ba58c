"""Prediction lens: the output of every layer's stream, for models whose output is numbers and not probabilities."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.demo_prompts import demo_texts
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts
from hooklens.metrics import squared_error
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.lens.layer_lens import lens_logits
from hooklens.plugins.lens.reading import stream_labels
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval


@dataclass(frozen=True, eq=False)
class PredictionLens(Result):
    """What each layer's stream predicts at every position, and its squared error at one; the last row is the model.

    `target` is what should be predicted at `pos`, and by default what the model itself predicts there. The errors are
    means over the numbers of the output. `control` is the error of the same predictions against the targets of the
    other prompts, NaN for one prompt: a layer that is not well below it predicts nothing about its own prompt.
    """

    terms = {
        "squared error": "of the stream's prediction, mean over prompts",
        "control": "the error of the same predictions against the targets of the other prompts",
        "correlation": "Pearson's, of prediction and target over prompts: a stream that holds the answer at another "
        "scale has it without the small error",
    }

    predictions: Float[Tensor, "layer prompt pos d_out"]
    target: Float[Tensor, "prompt d_out"]
    layers: list[str]
    pos: int
    own: bool  # is the target the model's own prediction?

    @property
    def read(self) -> Float[Tensor, "layer prompt d_out"]:
        """The predictions at `pos`."""
        return self.predictions[:, :, self.pos]

    @property
    def error(self) -> Float[Tensor, "layer prompt"]:
        """The squared error to the target, mean over the numbers of the output."""
        return (self.read - self.target).square().mean(-1)

    @property
    def control(self) -> Float[Tensor, "layer prompt"]:
        """The mean squared error to the targets of all other prompts."""
        n = len(self.target)
        if n < 2:
            return torch.full_like(self.error, float("nan"))
        # sum over j of (p - t_j)^2 = n (p - mean t)^2 + sum over j of (t_j - mean t)^2
        centred = self.target - self.target.mean(0)
        every = n * (self.read - self.target.mean(0)).square() + centred.square().sum(0)
        return (every.mean(-1) - self.error) / (n - 1)

    @property
    def correlation(self) -> Float[Tensor, "layer"]:
        """Pearson's correlation of prediction and target over prompts, mean over outputs; NaN where one is constant."""
        x, y = (values - values.mean(-2, keepdim=True) for values in (self.read, self.target))
        together, alone = (x * y).sum(-2), x.norm(dim=-2) * y.norm(dim=-2)
        return torch.where(alone > 0, together / alone, float("nan")).mean(-1)

    def interval(self) -> tuple[Float[Tensor, "layer"], Float[Tensor, "layer"]]:
        """Both ends of the mean error of each layer, by a bootstrap over prompts; NaN for one prompt."""
        return mean_interval(self.error.T)

    def table(self, n: int | None = None) -> Table:
        """One row per layer: the error with its interval, the control, and the correlation over prompts."""
        low, high = self.interval()
        parts = (self.error.mean(1), low, high, self.control.mean(1), self.correlation)
        rows = [(name, *(float(part[i]) for part in parts)) for i, name in enumerate(self.layers)]
        return Table(("stream", "squared error", "95% low", "95% high", "control", "correlation"), rows).head(n)

    def figure(self) -> Any:
        """The mean squared error by layer, beside the control."""
        from hooklens.viz.curves import lines

        to = "the model's own prediction" if self.own else "the target"
        shown = {"squared error": self.error.mean(1)}
        if len(self.target) > 1:
            shown["targets of other prompts"] = self.control.mean(1)
        bands = {"squared error": self.interval()} if len(self.target) > 1 else None
        title = f"Prediction lens: squared error to {to} at position {self.pos}"
        return lines(shown, None, bands, title, x_title="layer", y_title="squared error")


def prediction_lens(
    model: HookedTransformer,
    prompts: Prompts | PromptPairs,
    *,
    target: Any = None,
    pos: int = -1,
    incl_mid: bool = False,
) -> PredictionLens:
    """What would the model predict if it stopped before each block? The logit lens for outputs that are numbers.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model(embed={"part": "vectors", "d_in": 3}, d_vocab_out=1)
    >>> x = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
    >>> lens = prediction_lens(model, x, target=[0.0, 1.0, 0.5, 2.0, -1.0, 0.0])
    >>> lens.predictions.shape, lens.layers               # layer prompt pos d_out
    (torch.Size([3, 6, 5, 1]), ['0_pre', '1_pre', 'final_post'])
    >>> torch.equal(lens.predictions[-1], model(x))
    True

    Every stream goes through the final norm and the unembedding. `target` is one number per prompt, or `[prompt
    d_out]`: what should be predicted at `pos`. Without it, errors are distances to the model's own prediction.
    `incl_mid` also reads the stream between attention and MLP. An early stream need not use the basis that the
    unembedding reads: a large error there does not prove that the answer is absent, which a probe
    (`train_value_probe`) can tell.

    Reference: nostalgebraist (2020), "interpreting GPT: the logit lens".
    """
    predictions = lens_logits(model, prompts, incl_mid=incl_mid)
    n_prompts, n_pos = predictions.shape[1:3]
    if isinstance(pos, bool) or not isinstance(pos, int) or not -n_pos <= pos < n_pos:
        raise InputError(f"pos is one position from {-n_pos} to {n_pos - 1} of these prompts, got {pos!r:.60}")
    if target is None:
        aims = predictions[-1, :, pos]
    else:
        aims = squared_error(model, target=target).target.to(predictions)
        if len(aims) not in (1, n_prompts):
            raise InputError(f"target is one number per prompt, got {len(aims)} for {n_prompts} prompts")
    return PredictionLens(
        predictions=predictions,
        target=aims.expand(n_prompts, -1),
        layers=stream_labels(model, incl_mid=incl_mid),
        pos=pos % n_pos,
        own=target is None,
    )


def demo(model: HookedTransformer) -> PredictionLens:
    """How far the output of each layer's stream is from the model's own, on six prompts."""
    return prediction_lens(model, demo_texts(model, 6, 8))
