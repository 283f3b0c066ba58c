"""What is attention to some keys good for? Block it, let the head attend to the rest, and see how the metric moves."""

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
from hooklens.plugins.heads.rotations import Mask
from hooklens.plugins.heads.scores import key_masks
from hooklens.plugins.heads.which import Heads, refuse_dropout
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, q_values, sign_flip_p
from hooklens.sweeps.execute import execute
from hooklens.sweeps.nodes import read_heads
from hooklens.sweeps.plan import Patch, plan
from hooklens.sweeps.site_patches import SitePatches

if TYPE_CHECKING:
    from hooklens.core.cache import ActivationCache
    from hooklens.model.transformer import HookedTransformer

#: Layer by layer, which share of its weight each key keeps before the rest is normalised: 0 is blocked. One head where
#: all have the same.
Keeps = list[Float[Tensor, "sequence some_head query_pos key_pos"]]


@dataclass(frozen=True, eq=False)
class Knockout(Result):
    """How far the metric falls when each head may not look at the marked keys (above 0: looking there helps).

    `fall` is the metric of the untouched run minus that of the edited one, sequence by sequence.
    """

    ranked_by = "change of the metric"

    heads: list[str]
    kind: str
    fall: Float[Tensor, "sequence chosen"]
    base_per_sequence: Float[Tensor, "sequence"]
    largest_error: float

    def interval(self, level: float = 0.95) -> tuple[Float[Tensor, "chosen"], Float[Tensor, "chosen"]]:
        """Both ends of the mean fall, by a bootstrap over sequences."""
        return mean_interval(self.fall, level=level)

    @property
    def p(self) -> Float[Tensor, "chosen"]:
        """Two-sided p-value of "no fall", by flipping signs of whole sequences."""
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
        """Every head's mean fall with its interval."""
        from hooklens.viz.figures import bars

        title = f"Metric lost when attention to {self.kind} keys is blocked"
        return bars(self.fall.mean(0), *self.interval(), self.heads, title, y_title="nats a token")


def knockout(
    model: "HookedTransformer",
    tokens: Int[Tensor, "sequence pos"],
    metric: Any,
    *,
    kind: str = "induction",
    mask: Bool[Tensor, "row query_pos key_pos"] | None = None,
    heads: Heads | None = None,
) -> Knockout:
    """What does each head's attention to one kind of key do for the metric? Exact, one head at a time.

    Scores of the marked keys are set to minus infinity in that head alone; its softmax gives their share to the others.
    A query that sees nothing but marked keys is left as it was. `kind` is one of `key_masks`, or the name of your own
    `mask`; `heads` are (layer, head) or names, all of them by default.

    >>> from hooklens.testing import induction_model
    >>> model = induction_model(); sequences = repeated_tokens(model, 4)
    >>> found = knockout(model, sequences.tokens, sequences.metric())
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
    """Nothing of the marked keys, all of the others, in every layer and head."""
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
    """The same, with shares a layer, from the scores and values of a run that was made before: several can share it."""
    with torch.no_grad(), packed_linears(rows=1024):
        patches = [Patch(layer, None, head) for layer, head in chosen]
        values = _weakening(model, untouched, keeps)
        made = plan(model, tokens, "z", values, patches=patches)
        # in a causal model nothing can change before the first query that has a marked key
        blocked = torch.stack([(keep < 1).any(-1).any(1) for keep in keeps]).any(0)
        first = torch.where(blocked.any(1), blocked.long().argmax(1), tokens.shape[1])
        outcome = execute(SitePatches(replace(made, first_change=first.to(made.first_change))), metric)
    fall = (outcome.base - outcome.values).T
    return Knockout([head_name(layer, head) for layer, head in chosen], kind, fall, outcome.base, outcome.largest_error)


def without_keys(
    model: "HookedTransformer", tokens: Int[Tensor, "sequence pos"], mask: Mask
) -> Callable[[Tensor, str], Tensor]:
    """What to write at the z points so that no head looks at the marked keys: a function of (activation, point)."""
    return _weakening(model, scores_and_values(model, tokens), all_but(mask, model))


def scores_and_values(model: "HookedTransformer", tokens: Int[Tensor, "sequence pos"]) -> "ActivationCache":
    """What a knockout needs of the untouched run, whatever keys it blocks."""
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
    # where nothing is blocked the value that is there stays, to the last bit
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
    """Attention to what followed earlier occurrences, blocked on random tokens that repeat."""
    sequences = repeated_tokens(model, 4)
    return knockout(model, sequences.tokens, sequences.metric())
