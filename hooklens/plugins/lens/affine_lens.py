"""Tuned lens: a logit lens with a trained affine map per layer, so that each layer is read in its own basis."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import path_of, whole
from hooklens.core.errors import InputError
from hooklens.core.files import check_writable
from hooklens.core.gradients import need_gradients
from hooklens.data.demo_prompts import demo_texts
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts
from hooklens.metrics import Answers
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.lens.layer_lens import LogitLens, read_lens
from hooklens.plugins.lens.least_squares import regressed
from hooklens.plugins.lens.reading import answers_of, check_quiet, need_probabilities, one_length, stream_labels
from hooklens.plugins.lens.training import Schedule, constant_kl, train, window_kl
from hooklens.plugins.lens.translators import TunedLens as TunedLens
from hooklens.plugins.weights.needs import Needs, needs_tokens
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval


@dataclass(frozen=True, eq=False)
class TunedLensTraining(Result):
    """The effect of training for each layer, on held-out windows: KL(model || lens) in nats per token.

    `before` is the logit lens, `after` the tuned lens. `constant` is the KL of one fixed distribution, the model's mean
    prediction: a layer with a higher KL is worse than not reading the stream at all. `loss` is the training KL of every
    step.
    """

    ranked_by = "fall"

    before: Float[Tensor, "window layer"]
    after: Float[Tensor, "window layer"]
    constant: Float[Tensor, "window"]
    loss: Float[Tensor, "step layer"]
    layers: list[str]
    train_tokens: int
    steps: int = 0
    lr: float = 0.0
    seed: int = 0

    @property
    def fall(self) -> Float[Tensor, "layer"]:
        """The decrease of each layer's held-out KL, mean over windows."""
        return (self.before - self.after).mean(0)

    ranking = fall

    def fall_interval(self, level: float = 0.95) -> tuple[Float[Tensor, "layer"], Float[Tensor, "layer"]]:
        """The interval of `fall`, from a bootstrap over held-out windows; NaN for one window."""
        return mean_interval(self.before - self.after, level=level)

    def table(self, n: int | None = None) -> Table:
        """One row per layer: held-out KL of both lenses, and the decrease with its interval."""
        low, high = self.fall_interval()
        values = (self.before.mean(0), self.after.mean(0), self.fall, low, high)
        rows = [(layer, *(float(value[i]) for value in values)) for i, layer in enumerate(self.layers)]
        return Table(("stream", "logit lens", "tuned lens", "fall", "95% low", "95% high"), rows).head(n)

    def figure(self) -> Any:
        """Held-out KL by layer, before and after training, and that of one fixed distribution."""
        from hooklens.viz.curves import lines

        nothing = self.constant.mean().expand(len(self.layers))
        drawn = lines(
            {"logit lens": self.before.mean(0), "tuned lens": self.after.mean(0), "one fixed distribution": nothing},
            title="KL from the model's own prediction, held-out windows",
            x_title="layer",
            y_title="KL (nats per token)",
        )
        return drawn.update_yaxes(type="log")


def fit_tuned_lens(
    model: HookedTransformer, tokens: Prompts | PromptPairs | Iterable[Int[Tensor, "batch pos"]]
) -> tuple[TunedLens, TunedLensTraining]:
    """The tuned lens in closed form: for each layer, the affine map with the output closest to the final stream.

    >>> from hooklens.testing import tiny_model
    >>> tokens = torch.randint(11, (20, 8), generator=torch.Generator().manual_seed(0))
    >>> lens, fit = fit_tuned_lens(tiny_model(), tokens)
    >>> bool((fit.fall > 0).all())
    True

    The fit never unembeds, so it takes far less time than training, and it is a good starting point for it:
    `train_tuned_lens(model, tokens, start=lens, lr=1e-4)`. The last eighth of the windows is used for measuring only. A
    ridge of 1 % keeps directions that the windows do not determine near 0: use several times d_model tokens.

    Reference: Din et al. (2023), "Jump to Conclusions: Short-Cutting Transformers With Linear Transformations".
    """
    need_probabilities(model, "fit_tuned_lens")
    check_quiet(model)
    kept, measured = _split(_windows(model, tokens))
    lens = regressed(model, kept)
    with packed_linears(rows=1024):
        before, constant = window_kl(model, measured), constant_kl(model, kept, measured)
        after = window_kl(model, measured, lens)
    return lens, TunedLensTraining(
        before=before,
        after=after,
        constant=constant,
        loss=before.new_zeros(0, before.shape[1]),
        layers=stream_labels(model)[:-1],
        train_tokens=kept.numel(),
    )


def train_tuned_lens(
    model: HookedTransformer,
    tokens: Prompts | PromptPairs | Iterable[Int[Tensor, "batch pos"]],
    *,
    steps: int = 250,
    lr: float = 1e-3,
    batch: int = 4,
    seed: int = 0,
    start: TunedLens | None = None,
    path: str | Path | None = None,
) -> tuple[TunedLens, TunedLensTraining]:
    """Train an affine map for every layer so that its unembedded output predicts the model's final distribution.

    >>> from hooklens.testing import tiny_model
    >>> tokens = torch.randint(11, (20, 8), generator=torch.Generator().manual_seed(0))
    >>> lens, training = train_tuned_lens(tiny_model(), tokens, steps=60, lr=0.02)
    >>> bool((training.fall > 0).all())
    True

    `tokens` are windows of text `[window pos]`, or batches of them; the last eighth is used for measuring only. A step
    uses `batch` windows. Training starts from zero maps (the logit lens) or from another lens. All layers train from
    one forward pass, one layer and some hundred tokens at a time, so memory does not grow with layers times vocabulary.
    With `path`, the lens and the training state are written every minute, at the end, and on Ctrl-C; the same call
    continues from there, and the result equals that of an uninterrupted run bit for bit. `TunedLens.load(path)` reads
    the file at any time.

    Reference: Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens", section 2.
    """
    need_probabilities(model, "train_tuned_lens")
    need_gradients("train_tuned_lens")
    whole("steps", steps, 1)
    whole("batch", batch, 1)
    if not lr > 0:
        raise InputError(f"lr must be a learning rate above 0, got {lr!r}; 1e-3 from zero maps, 1e-4 from fitted ones")
    if start is not None:
        start.check_fits(model)
    kept, measured = _split(_windows(model, tokens))
    if path is not None:
        path = path_of(path)
        check_writable(path)
    schedule = Schedule(kept, steps, lr, seed, min(batch, len(kept)))
    with packed_linears(rows=1024):
        state, held = train(model, schedule, measured, start, path)
        lens = state.lens()
        after = window_kl(model, measured, lens)
    return lens, TunedLensTraining(
        before=held["before"],
        after=after,
        constant=held["constant"],
        loss=state.loss,
        layers=stream_labels(model)[:-1],
        train_tokens=kept.numel(),
        steps=steps,
        lr=lr,
        seed=seed,
    )


def tuned_lens(
    model: HookedTransformer,
    tokens: Prompts | PromptPairs,
    lens: TunedLens,
    *,
    answer: Answers | None = None,
    k: int = 5,
) -> LogitLens:
    """What does each layer predict through its own trained map? An untrained lens gives the result of `logit_lens`.

    >>> from hooklens.testing import tiny_model
    >>> reading = tuned_lens(tiny_model(), [[1, 2, 3]], TunedLens(n_layers=2, d_model=8))
    >>> reading.lens, reading.kl.shape                    # layer batch pos
    ('tuned lens', torch.Size([3, 1, 3]))

    The map is trained to agree with the model's output. It may therefore compute things that the layer does not yet
    contain in a form that later blocks use.

    Reference: Belrose et al. (2023), section 2.
    """
    need_probabilities(model, "tuned_lens")
    lens.check_fits(model)
    ids, right = one_length(model, tokens), answers_of(tokens, answer)[0]
    return read_lens(model, ids, answer=right, k=k, translate=lens, lens="tuned lens")


def _split(windows: Int[Tensor, "window pos"]) -> tuple[Int[Tensor, "kept pos"], Int[Tensor, "measured pos"]]:
    """Split into training windows and the last eighth for measuring."""
    if len(windows) < 2:
        raise InputError(
            f"a tuned lens needs windows for training and windows for measuring, got {len(windows)}; cut the text into "
            "at least two"
        )
    measured = max(1, round(len(windows) / 8))
    return windows[:-measured], windows[-measured:]


def _windows(model: HookedTransformer, tokens: Any) -> Int[Tensor, "window pos"]:
    """Windows from a tensor, prompts, or batches of windows."""
    if isinstance(tokens, Tensor | str | PromptPairs):
        return one_length(model, tokens)
    parts = list(tokens)
    if parts and all(isinstance(part, Tensor) and part.ndim == 2 for part in parts):
        lengths = sorted({part.shape[1] for part in parts})
        if len(lengths) > 1:
            raise InputError(f"batches of windows [batch pos] must have one length, got {lengths}; cut the text evenly")
        return one_length(model, torch.cat(parts))
    return one_length(model, parts)


def demo(model: HookedTransformer) -> TunedLensTraining | Needs:
    """Twenty steps on eight short sentences; random token numbers if the model has no tokenizer."""
    return needs_tokens(model) or train_tuned_lens(model, demo_texts(model, 8, 8), steps=20, lr=0.02)[1]
