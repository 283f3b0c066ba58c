"""Attention knockout: block a head's attention to some keys, renormalise over the rest, and measure the metric."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.component import head_name
from hooklens.core.errors import InputError, did_you_mean
from hooklens.data.repeated import repeated_tokens
from hooklens.model.ids import as_ids
from hooklens.model.linear import packed_linears
from hooklens.plugins.heads.head_scores import key_masks
from hooklens.plugins.heads.rotations import Mask
from hooklens.plugins.heads.which import Heads, refuse_dropout
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, q_values, sign_flip_p
from hooklens.sweeps.execution import execute
from hooklens.sweeps.nodes import read_heads
from hooklens.sweeps.planning import Patch, plan
from hooklens.sweeps.site_patches import SitePatches

if TYPE_CHECKING:
    from hooklens.core.cache import ActivationCache
    from hooklens.model.transformer import HookedTransformer

#: For each layer, the share of its weight that each key keeps before the rest is normalised: 0 is blocked. A single
#: head if all have the same.
Keeps = list[Float[Tensor, "sequence some_head query_pos key_pos"]]


@dataclass(frozen=True, eq=False)
class Knockout(Result):
    """The decrease of the metric when each head cannot attend to the marked keys (above 0: this attention helps).

    `fall` is the metric of the untouched run minus that of the edited run, sequence by sequence.
    """

    ranked_by = "change of the metric"

    heads: list[str]
    kind: str
    fall: Float[Tensor, "sequence chosen"]
    base_per_sequence: Float[Tensor, "sequence"]
    largest_error: float

    def interval(self, level: float = 0.95) -> tuple[Float[Tensor, "chosen"], Float[Tensor, "chosen"]]:
        """The interval of the mean decrease, from a bootstrap over sequences."""
        return mean_interval(self.fall, level=level)

    @property
    def p(self) -> Float[Tensor, "chosen"]:
        """Two-sided p-value of "no decrease", from sign flips of whole sequences."""
        return sign_flip_p(self.fall)

    @property
    def q(self) -> Float[Tensor, "chosen"]:
        """Benjamini-Hochberg over the heads."""
        return q_values(self.p)

    def table(self, n: int | None = 12) -> Table:
        """One row a head, the largest mean change first."""
        mean, (low, high), q = self.fall.mean(0), self.interval(), self.q
        order = mean.abs().argsort(descending=True, stable=True).tolist()[:n]
        rows = [(self.heads[i], float(mean[i]), float(low[i]), float(high[i]), float(q[i])) for i in order]
        return Table(("head", f"fall without {self.kind}", "95% low", "95% high", "q"), rows)

    def figure(self) -> Any:
        """Every head's mean decrease with its interval."""
        from hooklens.viz.figures import bars

        title = f"Metric lost when attention to {self.kind} keys is blocked"
        return bars(self.fall.mean(0), *self.interval(), self.heads, title, y_title="nats per token")


def knock_out_keys(
    model: "HookedTransformer",
    tokens: Int[Tensor, "sequence pos"],
    metric: Any,
    *,
    kind: str = "induction",
    mask: Bool[Tensor, "row query_pos key_pos"] | None = None,
    heads: Heads | None = None,
) -> Knockout:
    """What does each head's attention to one kind of key contribute to the metric? Exact, one head at a time.

    The scores of the marked keys are set to minus infinity in that head only; the softmax distributes their share over
    the other keys. A query that sees only marked keys is unchanged. `kind` is one of `key_masks`, or the name of your
    own `mask`; `heads` are (layer, head) or names, all of them by default.

    >>> from hooklens.testing import induction_model
    >>> model = induction_model(); sequences = repeated_tokens(model, 4)
    >>> found = knock_out_keys(model, sequences.tokens, sequences.metric())
    >>> found.table(1).rows[0][0], bool(found.fall.mean(0)[3] > 1), found.fall.mean(0)[2].item()
    ('L1H1', True, 0.0)

    Reference: Geva et al. (2023), "Dissecting Recall of Factual Associations", section 4 (attention knockout).
    """
    tokens = as_ids(tokens, device=model.device)
    mask = _mask(tokens, kind) if mask is None else mask.to(model.device)
    if mask.shape != (*tokens.shape, tokens.shape[1]):
        raise InputError(f"mask has shape {list(mask.shape)}; tokens {list(tokens.shape)} need [sequence query key]")
    refuse_dropout(model)
    chosen = read_heads(model, heads)
    keeps = all_but(mask, model)
    return knockout_after(
        model, scores_and_values(model, tokens), tokens=tokens, metric=metric, kind=kind, keeps=keeps, chosen=chosen
    )


def all_but(mask: Mask, model: "HookedTransformer") -> Keeps:
    """Shares that block the marked keys and keep all others, in every layer and head."""
    return [(~mask[:, None]).to(model.dtype)] * model.cfg.n_layers


def knockout_after(
    model: "HookedTransformer",
    untouched: "ActivationCache",
    tokens: Int[Tensor, "sequence pos"],
    metric: Any,
    kind: str,
    keeps: Keeps,
    chosen: list[tuple[int, int]],
) -> Knockout:
    """`knockout` with shares per layer, using the scores and values of an earlier run, so that calls can share it."""
    with torch.no_grad(), packed_linears(rows=1024):
        patches = [Patch(layer, None, head) for layer, head in chosen]
        values = _weakening(model, untouched, keeps)
        made = plan(model, tokens, "z", values, patches=patches)
        # in a causal model nothing changes before the first query with a marked key
        blocked = torch.stack([(keep < 1).any(-1).any(1) for keep in keeps]).any(0)
        first = torch.where(blocked.any(1), blocked.long().argmax(1), tokens.shape[1])
        outcome = execute(SitePatches(replace(made, first_change=first.to(made.first_change))), metric)
    fall = (outcome.base - outcome.values).T
    return Knockout([head_name(layer, head) for layer, head in chosen], kind, fall, outcome.base, outcome.largest_error)


def without_keys(
    model: "HookedTransformer", tokens: Int[Tensor, "sequence pos"], mask: Mask
) -> Callable[[Tensor, str], Tensor]:
    """The values to write at the z points so that no head attends to the marked keys, as a function (act, point)."""
    return _weakening(model, scores_and_values(model, tokens), all_but(mask, model))


def scores_and_values(model: "HookedTransformer", tokens: Int[Tensor, "sequence pos"]) -> "ActivationCache":
    """Everything that a knockout needs from the untouched run, whichever keys it blocks."""
    with torch.no_grad(), packed_linears(rows=1024):
        return model.run_with_cache(tokens, ["attn_scores", "v"], stop_at_layer=model.cfg.n_layers)[1]


def _weakening(model: "HookedTransformer", cache: "ActivationCache", keeps: Keeps) -> Callable[[Tensor, str], Tensor]:
    changed, new = {}, {}
    for layer in range(model.cfg.n_layers):
        attn, scores, v = model.blocks[layer].attn, cache["attn_scores", layer], cache["v", layer]
        name = f"blocks.{layer}.attn.hook_z"
        seen = scores > -torch.inf
        blocked = _spare_empty((keeps[layer] == 0) & seen, seen)
        keep = torch.where(keeps[layer] == 0, 1.0, keeps[layer]).to(scores)  # these are blocked below, or spared
        pattern = attn.score.pattern(scores.masked_fill(blocked, -torch.inf), None)
        if bool((keep < 1).any()):
            kept = pattern * keep
            whole = kept.sum(-1, keepdim=True).clamp_min(1e-30) if attn.score.row_sums_to_one else 1.0
            pattern = kept / whole
        changed[name] = (blocked | (keep < 1)).any(-1).transpose(1, 2)[..., None]
        new[name] = attn.weigh(pattern.to(v.dtype), v)
    # where nothing is blocked, the original value stays, bit for bit
    return lambda z, name: torch.where(changed[name], new[name], z)


def _spare_empty(
    blocked: Bool[Tensor, "sequence head query_pos key_pos"], seen: Bool[Tensor, "sequence head query_pos key_pos"]
) -> Bool[Tensor, "sequence head query_pos key_pos"]:
    return blocked & (seen & ~blocked).any(-1, keepdim=True)


def _mask(tokens: Tensor, kind: str) -> Mask:
    masks = key_masks(tokens)
    if kind not in masks:
        raise did_you_mean("kind of key", kind, masks)
    return masks[kind]


def demo(model: "HookedTransformer") -> Knockout:
    """Block attention to what followed earlier occurrences, on random tokens that repeat."""
    sequences = repeated_tokens(model, 4)
    return knock_out_keys(model, sequences.tokens, sequences.metric())
