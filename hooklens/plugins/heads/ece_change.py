"""The change of a model's calibration when a head is ablated, compared with equally large changes to other heads."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.component import head_name
from hooklens.core.errors import HooklensError
from hooklens.core.precision import widened
from hooklens.core.progress_bar import progress
from hooklens.data.repeated import repeated_tokens
from hooklens.model.linear import packed_linears
from hooklens.plugins.heads.mediation import mean_z
from hooklens.plugins.lens.calibration import Calibration, binned_error, measure_calibration
from hooklens.results.result import Result, Table
from hooklens.results.statistics import DRAWS, null_p, q_values, quantiles

if TYPE_CHECKING:
    from hooklens.core.cache import ActivationCache
    from hooklens.model.transformer import HookedTransformer

_CONTROLS = 19  # the smallest p is then 0.05
_LENGTH = 32  # tokens of an excerpt
Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class CalibrationChange(Result):
    """The change of the expected calibration error when each head is mean-ablated: above 0, the head calibrates.

    `low` and `high` come from a bootstrap over texts. `control` contains the changes when another head is moved towards
    its mean instead, far enough to change the output by the same norm: the heads nearest in depth, the same layer
    first; NaN if there are fewer. `loss_change` is reported too, because a worse model is also worse calibrated.
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
        each = [
            null_p(x.abs(), c[~c.isnan()].abs()) if bool((~c.isnan()).any()) else x.new_tensor(torch.nan).double()
            for x, c in zip(self.change, self.control, strict=True)
        ]
        return torch.stack(each) if each else self.change.double()

    @property
    def q(self) -> Float[Tensor, "chosen"]:
        """Benjamini-Hochberg over the heads."""
        return q_values(self.p)

    def table(self, n: int | None = 12) -> Table:
        """One row per head: the change, its interval, the controls, and the loss."""
        shown = (self.change, self.low, self.high, self.p, self.control.abs().nanmean(1), self.loss_change.mean(0))
        rows = [(self.heads[i], *(_number(one[i]) for one in shown)) for i in _largest(self.change)[:n]]
        return Table(("head", "ECE change", "low", "high", "p", "controls (size)", "loss change"), rows)

    def figure(self) -> Any:
        """The change for every head, with its interval."""
        from hooklens.viz.figures import bars

        title = f"Calibration error without each head (with all: {self.ece:.3f})"
        return bars(self.change, self.low, self.high, self.heads, title, y_title="change of the ECE")


def _largest(x: Float[Tensor, "chosen"]) -> list[int]:
    return x.abs().argsort(descending=True, stable=True).tolist()


def _number(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def calibration_text(model: "HookedTransformer", n: int, seed: int = 0) -> tuple[Int[Tensor, "sequence pos"], str]:
    """Text for measuring calibration, and its name: excerpts if there is a tokenizer, else repeated random tokens."""
    try:
        excerpts = None if model.tokenizer is None else _excerpts(model, n, seed)
    except HooklensError:  # the text is not in the cache and cannot be fetched
        excerpts = None
    if excerpts is not None:
        return excerpts, "excerpts of Shakespeare"
    return repeated_tokens(model, n, seed=seed).tokens, "random tokens that repeat"


def _excerpts(model: "HookedTransformer", n: int, seed: int) -> Int[Tensor, "sequence pos"] | None:
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
    model: "HookedTransformer",
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
    bins, n_heads = measure_calibration(model, tokens), model.cfg.n_heads
    every = [divmod(i, n_heads) for i in range(model.cfg.n_layers * n_heads)]
    near = {head: _nearest(head, [one for one in every if one not in heads], controls) for head in heads}
    with torch.no_grad(), packed_linears(rows=1024):
        _, cache = model.run_with_cache(tokens, ["z", "resid_pre"], stop_at_layer=model.cfg.n_layers)
        mean = mean_z(model, cache)
        size = torch.stack([_size(model, cache, mean, layer) for layer in range(model.cfg.n_layers)])
        base = _moved(
            model, tokens, cache=cache, mean=mean, head=every[-1], by=0.0, base=bins
        )  # by the same arithmetic, to the last bit
        runs: list[list[Calibration]] = []
        with progress("calibration", sum(1 + len(near[head]) for head in heads), unit="runs") as advance:
            for head in heads:
                row = []
                for one in (head, *near[head]):
                    by = float(size[head] / size[one]) if one != head and size[one] > 0 else 1.0
                    row.append(_moved(model, tokens, cache=cache, mean=mean, head=one, by=by, base=base))
                    advance()
                runs.append(row)
    change, low, high = _changes(base, [row[0] for row in runs], seed)
    control = change.new_full((len(heads), max([len(one) for one in near.values()], default=0)), torch.nan)
    for i, row in enumerate(runs):
        for j, other in enumerate(row[1:]):
            control[i, j] = other.expected_error - base.expected_error
    loss = torch.stack([row[0].loss.mean(1) - base.loss.mean(1) for row in runs], 1)
    return CalibrationChange(
        heads=[head_name(a, b) for a, b in heads],
        ece=base.expected_error,
        change=change,
        low=low,
        high=high,
        control=control,
        loss_change=loss,
        data=data,
    )


def _nearest(head: Head, others: list[Head], n: int) -> list[Head]:
    return sorted(others, key=lambda one: (abs(one[0] - head[0]), one))[:n]


def _size(model, cache: "ActivationCache", mean: dict[int, Tensor], layer: int) -> Float[Tensor, "head"]:
    """How much of each head's output in a layer is lost when it is replaced by its mean."""
    attn, z = model.blocks[layer].attn, cache["z", layer]
    return widened(attn.results(z) - attn.results(mean[layer].to(z))).square().sum((0, 1, 3)).sqrt()


def _moved(
    model, tokens: Tensor, cache: "ActivationCache", mean: dict[int, Tensor], head: Head, by: float, base: Calibration
) -> Calibration:
    """The predictions when a head's z is moved part of the way to its mean, in the bins of the untouched run."""
    layer, number = head

    def move(z: Tensor, hook: Any) -> Tensor:
        z[:, :, number] += by * (mean[layer].to(z)[:, :, number] - z[:, :, number])
        return z

    stream, parts = cache["resid_pre", layer], []
    with model.hooks(fwd_hooks=[(("z", layer), move)]):
        out = model(stream, start_at_layer=layer, stop_at_layer=model.cfg.n_layers)
    for some, targets in zip(out[:, :-1].split(4), tokens[:, 1:].split(4), strict=True):  # few logits at a time
        log_probs = widened(model.read_out(some)).log_softmax(-1)
        best, token = log_probs.max(-1)
        parts.append((best.exp().clamp_max(1.0), token == targets, -log_probs.gather(2, targets[..., None])[..., 0]))
    confidence, correct, loss = (torch.cat(part) for part in zip(*parts, strict=True))
    return replace(base, confidence=confidence.to(base.confidence), correct=correct, loss=loss.to(base.loss))


def _changes(base: Calibration, edited: list[Calibration], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The change of the error and the ends of its interval; texts are resampled, the same for all runs."""
    gaps = torch.stack([_gaps(one) for one in (base, *edited)])  # [run text bin]
    n = gaps.shape[1]
    drawn = torch.randint(n, (DRAWS, n), generator=seeded(seed))
    times = torch.stack([torch.ones(n, dtype=torch.long), *(row.bincount(minlength=n) for row in drawn)]).to(gaps)
    errors = binned_error(torch.einsum("dt,rtb->rdb", times, gaps), base.loss.numel())
    change = errors[1:] - errors[0]
    low, high = quantiles(change[:, 1:].transpose(0, 1), (0.025, 0.975))
    return change[:, 0], low, high


def _gaps(found: Calibration) -> Float[Tensor, "sequence bin"]:
    """Confidence minus correctness, summed over each text's predictions per bin."""
    gap = found.confidence - found.correct.to(found.confidence)
    return gap.new_zeros(len(gap), len(found.edges) - 1).scatter_add_(1, found.bin, gap)
