"""The way from a baseline to a prompt, straight in the embeddings: the metric and its slope token by token."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.gradients import need_gradients
from hooklens.data.prompts import Prompts, rows_of
from hooklens.metrics import ReadingMetric
from hooklens.model.config import TokenEmbed
from hooklens.model.ids import show
from hooklens.plugins.patching.attribution_patching import backward_rows
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import why_plain

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

PerToken = Float[Tensor, "prompt pos"]
PerPrompt = Float[Tensor, "prompt"]
_WORDS = ("zero", "mean")


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

    tokens: Int[Tensor, "prompt pos"]
    baseline: str | Int[Tensor, "prompt pos"]
    metric: Any
    str_tokens: list[list[str]]

    @classmethod
    def of(cls, model: "HookedTransformer", prompts: Prompts, metric: Any, baseline: Any) -> "EmbeddingPath":
        need_gradients("an attribution to tokens")
        if not isinstance(model.cfg.embed, TokenEmbed):
            raise InputError("token attributions need a model that reads tokens; this one reads vectors")
        reason = why_plain(model)
        if reason is not None and reason.startswith("dropout"):
            raise InputError(f"gradients were asked for while {reason}: every pass would draw other masks")
        tokens = _of_one_length(rows_of(model, prompts, "prompts"))
        if not isinstance(baseline, str) or baseline not in _WORDS:
            baseline = _of_one_length(rows_of(model, baseline, "baseline"))
            if baseline.shape != tokens.shape:
                raise InputError(
                    f"a baseline holds one prompt of the same length for each, got {list(baseline.shape)} tokens for "
                    f"{list(tokens.shape)}; or 'zero' or 'mean'"
                )
        return cls(tokens, baseline, metric, [show(model, row) for row in tokens])

    @property
    def name(self) -> str:
        """What the baseline is called."""
        return "other prompts" if isinstance(self.baseline, Tensor) else self.baseline

    def slopes(
        self, model: "HookedTransformer", at: Float[Tensor, "node prompt"]
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
    def metric_at_baseline(self, model: "HookedTransformer") -> PerPrompt:
        """The metric where the line begins; no gradient is asked for there, which may not be finite."""
        start, _ = self._ends(model)
        write = ("hook_embed", lambda act, hook: start)
        stream = model.run_with_hooks(self.tokens, fwd_hooks=[write], stop_at_layer=model.cfg.n_layers)
        return Reader(model, self.metric, stream).base

    def _ends(self, model: "HookedTransformer") -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x = _embedded(model, self.tokens)
            if isinstance(self.baseline, Tensor):
                start = _embedded(model, self.baseline)
            elif self.baseline == "zero":
                start = torch.zeros_like(x)
            else:
                start = model.embed(torch.arange(model.cfg.d_vocab, device=x.device)[None])[0].mean(0).expand_as(x)
        return start, x - start

    def _some(self, model: "HookedTransformer", start: Tensor, step: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        n, n_layers = len(at), model.cfg.n_layers
        metric = self.metric
        if isinstance(metric, ReadingMetric):
            metric = metric.pairs(torch.arange(len(self.tokens)).repeat(n))
        with torch.enable_grad():
            x = (start + at.to(step)[..., None, None] * step).flatten(0, 1).requires_grad_()
            write = ("hook_embed", lambda act, hook: x)
            stream = model.run_with_hooks(self.tokens.repeat(n, 1), fwd_hooks=[write], stop_at_layer=n_layers)
            reader = Reader(model, metric, stream.detach())
            total = reader.in_graph(stream).sum()
            if not total.requires_grad:
                raise InputError(
                    "the metric has no gradient (does it compare, round or take an argmax?); ablate tokens"
                )
            (grad,) = torch.autograd.grad(total, x)
        slope = (grad.unflatten(0, (n, -1)) * step).sum(-1)
        return reader.base.view(n, -1), slope.to(reader.dtype)

    def at_end(self, model: "HookedTransformer") -> PerToken:
        """Gradient x input: the slope at the prompts themselves."""
        return self.slopes(model, torch.ones(1, len(self.tokens)))[1][0]


def _embedded(model: "HookedTransformer", tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos d_model"]:
    """What `hook_embed` holds, other people's edits included."""
    return model.run_with_cache(tokens, names="hook_embed", stop_at_layer=0)[1]["hook_embed"]


def _of_one_length(rows: list[Int[Tensor, "_"]]) -> Int[Tensor, "prompt pos"]:
    if len({len(row) for row in rows}) > 1:
        lengths = sorted({len(row) for row in rows})
        raise InputError(f"tokens are attributed prompt by prompt of one length, got {lengths}; take each length apart")
    return torch.stack(rows)
