"""The change of a model's calibration when a head is ablated, compared with equally large changes to other heads."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.cache import ActivationCache
from hooklens.core.component import head_name
from hooklens.core.errors import HooklensError
from hooklens.core.precision import widened
from hooklens.core.progress_bar import tracked
from hooklens.data.repeated import repeated_tokens
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.head_ranking import Head, head_table
from hooklens.plugins.heads.which import captured
from hooklens.plugins.lens.calibration import Calibration, binned_error, measure_calibration
from hooklens.results.result import Result, Table
from hooklens.results.statistics import DRAWS, Tested, null_p, quantiles

_CONTROLS = 19  # the smallest p is then 0.05
_LENGTH = 32  # tokens of an excerpt


@dataclass(frozen=True, eq=False)
class CalibrationChange(Tested, Result):
    """The change of the expected calibration error when each head is mean-ablated: above 0, the head calibrates.

    `low` and `high` come from a bootstrap over texts. `control` contains the changes when another head is moved towards
    its mean instead, far enough to change the output by the same norm: the heads nearest in depth, the same layer
    first. `loss_change` is reported too, because a worse model is also worse calibrated.
    """

    ranked_by = "change of the calibration error"

    heads: list[str]
    ece: float
    change: Float[Tensor, "chosen"]
    low: Float[Tensor, "chosen"]
    high: Float[Tensor, "chosen"]
    control: Float[Tensor, "chosen control"]
    loss_change: Float[Tensor, "sequence chosen"]
    data: str

    @property
    def p(self) -> Float[Tensor, "chosen"]:
        """How often a control changes the error as much, in either direction; at least 1 / (controls + 1)."""
        if not self.control.shape[1]:
            return torch.full_like(self.change, torch.nan, dtype=torch.float64)
        return null_p(self.change.abs(), self.control.abs().T)

    def table(self, n: int | None = 12) -> Table:
        """One row per head: the change, its interval, the controls, and the loss."""
        columns = {"ECE change": self.change, "low": self.low, "high": self.high, "p": self.p}
        columns |= {"controls (size)": self.control.abs().nanmean(1), "loss change": self.loss_change.mean(0)}
        return head_table(self.change.abs(), columns, n, names=self.heads)

    def figure(self) -> Any:
        """The change for every head, with its interval."""
        from hooklens.viz.figures import bars

        title = f"Calibration error without each head (with all: {self.ece:.3f})"
        return bars(self.change, self.low, self.high, self.heads, title, y_title="change of the ECE")


def calibration_text(model: HookedTransformer, n: int, seed: int = 0) -> tuple[Int[Tensor, "sequence pos"], str]:
    """Text for measuring calibration, and its name: excerpts if there is a tokenizer, else repeated random tokens."""
    try:
        excerpts = None if model.tokenizer is None else _excerpts(model, n, seed)
    except HooklensError:  # the text is not in the cache and cannot be fetched
        excerpts = None
    if excerpts is not None:
        return excerpts, "excerpts of Shakespeare"
    return repeated_tokens(model, n, seed=seed).tokens, "random tokens that repeat"


def _excerpts(model: HookedTransformer, n: int, seed: int) -> Int[Tensor, "sequence pos"] | None:
    """Pieces of the text asset from random places; None if this tokenizer cannot read it."""
    from hooklens.pretrained.assets import text

    whole, length = text(), min(_LENGTH, model.cfg.n_ctx)
    starts = torch.randint(len(whole) - 40 * length, (n,), generator=seeded(seed)).tolist()
    rows = [model.to_tokens(whole[whole.index("\n", at) + 1 :][: 20 * length])[0] for at in starts]
    if min(map(len, rows)) < length:
        return None
    ids, tokenizer = torch.stack([row[:length] for row in rows]), model.tokenizer
    readable = tokenizer is None or tokenizer.unk_id is None or float((ids == tokenizer.unk_id).float().mean()) < 0.05
    return ids if readable and int(ids.max()) < model.cfg.d_vocab_out else None


def calibration_change(
    model: HookedTransformer,
    tokens: Int[Tensor, "sequence pos"],
    heads: list[Head],
    data: str,
    *,
    controls: int = _CONTROLS,
    seed: int = 0,
) -> CalibrationChange:
    """How does the calibration error on these texts change without each head, compared with `controls` other heads?

    >>> from hooklens.testing import induction_model
    >>> tokens = repeated_tokens(induction_model(), 8).tokens
    >>> found = calibration_change(induction_model(), tokens, [(0, 1), (1, 1)], "repeats")
    >>> found.change[0].item(), bool(found.change[1] != 0), found.control.shape      # chosen control
    (0.0, True, torch.Size([2, 2]))
    """
    every = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    others = [head for head in every if head not in heads]
    measured = measure_calibration(model, tokens)
    with torch.no_grad(), packed_linears(rows=1024):
        _, cache = captured(model, tokens, ["z", "resid_pre"])
        size = torch.stack([_size(model, cache["z", layer], layer) for layer in range(model.cfg.n_layers)])
        jobs: list[tuple[Head, float]] = []
        for head in heads:
            near = sorted(others, key=lambda other: (abs(other[0] - head[0]), other))
            for other in (head, *near[:controls]):
                jobs.append((other, float(size[head] / size[other]) if size[other] > 0 else 1.0))
        # nothing is moved, by the arithmetic of the other runs: an idle head then changes nothing to the last bit
        base = _moved(model, tokens, cache, head=every[-1], by=0.0, base=measured)
        runs = [
            _moved(model, tokens, cache, head=head, by=by, base=base)
            for head, by in tracked(jobs, "calibration", "runs")
        ]
    n_runs = 1 + min(controls, len(others))  # of each head: its own, then the controls
    ablated = runs[::n_runs]
    change, low, high = _changes(base, ablated, seed)
    error = change.new_tensor([run.expected_error for run in runs]).view(len(heads), n_runs)
    return CalibrationChange(
        heads=[head_name(*head) for head in heads],
        ece=base.expected_error,
        change=change,
        low=low,
        high=high,
        control=error[:, 1:] - base.expected_error,
        loss_change=torch.stack([run.loss.mean(1) - base.loss.mean(1) for run in ablated], 1),
        data=data,
    )


def _size(model: HookedTransformer, z: Float[Tensor, "sequence pos head d_head"], layer: int) -> Float[Tensor, "head"]:
    """How much of each head's output in a layer is lost when it is replaced by its mean."""
    attn = model.blocks[layer].attn
    lost = attn.results(z) - attn.results(z.mean((0, 1), keepdim=True))
    return widened(lost).square().sum((0, 1, 3)).sqrt()


def _moved(
    model: HookedTransformer,
    tokens: Int[Tensor, "sequence pos"],
    cache: ActivationCache,
    head: Head,
    by: float,
    base: Calibration,
) -> Calibration:
    """The predictions when a head's z is moved part of the way to its mean, in the bins of the untouched run."""
    layer, number = head
    mean = cache["z", layer][:, :, number].mean((0, 1))

    def move(z: Tensor, hook: Any) -> Tensor:
        z[:, :, number] += by * (mean - z[:, :, number])
        return z

    with model.hooks(fwd_hooks=[(("z", layer), move)]):
        out = model(cache["resid_pre", layer], start_at_layer=layer, stop_at_layer=model.cfg.n_layers)
    parts = []
    for some, targets in zip(out[:, :-1].split(4), tokens[:, 1:].split(4), strict=True):  # few logits at a time
        log_probs = widened(model.read_out(some)).log_softmax(-1)
        best, token = log_probs.max(-1)
        parts.append((best.exp().clamp_max(1.0), token == targets, -log_probs.gather(2, targets[..., None])[..., 0]))
    confidence, correct, loss = (torch.cat(part) for part in zip(*parts, strict=True))
    return replace(base, confidence=confidence.to(base.confidence), correct=correct, loss=loss.to(base.loss))


def _changes(base: Calibration, edited: list[Calibration], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The change of the error and the ends of its interval; texts are resampled, the same for all runs."""
    gaps = torch.stack([_gaps(run) for run in (base, *edited)])  # [run text bin]
    n = gaps.shape[1]
    drawn = torch.randint(n, (DRAWS, n), generator=seeded(seed))
    times = torch.stack([torch.ones(n, dtype=torch.long), *(row.bincount(minlength=n) for row in drawn)]).to(gaps)
    errors = binned_error(torch.einsum("dt,rtb->rdb", times, gaps), base.loss.numel())
    change = errors[1:] - errors[0]
    low, high = quantiles(change[:, 1:].transpose(0, 1), (0.025, 0.975))
    return change[:, 0], low, high


def _gaps(run: Calibration) -> Float[Tensor, "sequence bin"]:
    """Confidence minus correctness, summed over each text's predictions per bin."""
    gap = run.confidence - run.correct.to(run.confidence)
    return gap.new_zeros(len(gap), len(run.edges) - 1).scatter_add_(1, run.bin, gap)
