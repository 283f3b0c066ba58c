"""Attention knockout: block a head's attention to some keys, renormalise over the rest, and measure the metric."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hooklens.core.cache import ActivationCache
from hooklens.core.component import head_name
from hooklens.core.errors import InputError, WrongType, did_you_mean
from hooklens.data.demo_prompts import demo_texts
from hooklens.data.prompts import Prompts, reads_vectors
from hooklens.data.repeated import repeated_tokens
from hooklens.metrics import need_metric, prediction
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.head_ranking import Head, head_table
from hooklens.plugins.heads.head_scores import key_masks
from hooklens.plugins.heads.rotations import Mask
from hooklens.plugins.heads.which import Heads, captured, check_model, one_length
from hooklens.results.account import RunAccount
from hooklens.results.result import Result, Table
from hooklens.results.statistics import Tested, mean_interval, sign_flip_p
from hooklens.sweeps.execution import execute
from hooklens.sweeps.nodes import read_heads
from hooklens.sweeps.planning import Patch, plan
from hooklens.sweeps.site_patches import SitePatches

#: For each layer, the share of its weight that each key keeps before the rest is normalised: 0 is blocked. A single
#: head if all have the same.
Keeps = list[Float[Tensor, "sequence some_head query_pos key_pos"]]
#: What a knockout needs of the untouched run, whichever keys it blocks.
KEPT = ["attn_scores", "v"]


@dataclass(frozen=True, eq=False)
class Knockout(RunAccount, Tested, Result):
    """The decrease of the metric when each head cannot attend to the marked keys (above 0: this attention helps).

    `fall` is the metric of the untouched run minus that of the edited run, sequence by sequence.
    """

    ranked_by = "change of the metric"

    heads: list[str]
    kind: str
    fall: Float[Tensor, "sequence chosen"]
    base_per_sequence: Float[Tensor, "sequence"]

    def interval(self, level: float = 0.95) -> tuple[Float[Tensor, "chosen"], Float[Tensor, "chosen"]]:
        """The interval of the mean decrease, from a bootstrap over sequences."""
        return mean_interval(self.fall, level=level)

    @property
    def p(self) -> Float[Tensor, "chosen"]:
        """Two-sided p-value of "no decrease", from sign flips of whole sequences."""
        return sign_flip_p(self.fall)

    def table(self, n: int | None = 12) -> Table:
        """One row a head, the largest mean change first."""
        mean, (low, high) = self.fall.mean(0), self.interval()
        columns = {f"fall without {self.kind}": mean, "95% low": low, "95% high": high, "q": self.q}
        return head_table(mean.abs(), columns, n, names=self.heads)

    def figure(self) -> Any:
        """Every head's mean decrease with its interval."""
        from hooklens.viz.figures import bars

        title = f"Metric lost when attention to {self.kind} keys is blocked"
        return bars(self.fall.mean(0), *self.interval(), self.heads, title, y_title="nats per token")


def knock_out_keys(
    model: HookedTransformer,
    tokens: Prompts,
    metric: Any,
    *,
    kind: str = "induction",
    mask: Mask | None = None,
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
    check_model(model, "knock_out_keys")
    need_metric(metric)
    tokens, chosen = one_length(model, tokens), read_heads(model, heads)
    keeps = all_but(_mask(tokens, kind, mask), model)
    untouched = captured(model, tokens, KEPT)[1]
    return knockout_after(model, untouched, tokens=tokens, metric=metric, kind=kind, keeps=keeps, chosen=chosen)


def _mask(tokens: Shaped[Tensor, "sequence pos *d_in"], kind: str, own: Any) -> Mask:
    """The keys of this kind, or the user's own mask."""
    if own is None:
        masks = key_masks(tokens)
        if kind not in masks:
            raise did_you_mean("kind of key", str(kind), masks)
        if not bool(masks[kind].any()):
            raise InputError(
                f"these prompts have no key of the kind {kind!r}, so that nothing would be blocked (vectors rarely "
                "recur); give another kind, or your own mask="
            )
        return masks[kind]
    if not isinstance(own, Tensor) or own.dtype != torch.bool:
        raise WrongType(f"mask is a boolean tensor [sequence query key], True at the keys to block; got {own!r:.80}")
    if own.shape != (*tokens.shape[:2], tokens.shape[1]):
        raise InputError(f"mask has shape {list(own.shape)}; tokens {list(tokens.shape)} need [sequence query key]")
    return own.to(tokens.device)


def all_but(mask: Mask, model: HookedTransformer) -> Keeps:
    """Shares that block the marked keys and keep all others, in every layer and head."""
    return [(~mask[:, None]).to(model.dtype)] * model.cfg.n_layers


def knockout_after(
    model: HookedTransformer,
    untouched: ActivationCache,
    tokens: Shaped[Tensor, "sequence pos *d_in"],
    metric: Any,
    kind: str,
    keeps: Keeps,
    chosen: list[Head],
) -> Knockout:
    """`knock_out_keys` with shares per layer and an earlier run's activations `KEPT`, so that calls can share it."""
    with torch.no_grad(), packed_linears(rows=1024):
        values = weakened(model, untouched, keeps)
        sweep = plan(model, tokens, "z", values, patches=[Patch(layer, None, head) for layer, head in chosen])
        # in a causal model nothing changes before the first query with a marked key
        blocked = torch.stack([(keep < 1).any(-1).any(1) for keep in keeps]).any(0)
        first = torch.where(blocked.any(1), blocked.long().argmax(1), tokens.shape[1])
        outcome = execute(SitePatches(replace(sweep, first_change=first.to(sweep.first_change))), metric)
    return Knockout(
        heads=[head_name(layer, head) for layer, head in chosen],
        kind=kind,
        fall=(outcome.base - outcome.values).T,
        base_per_sequence=outcome.base,
        **outcome.account,
    )


def weakened(model: HookedTransformer, untouched: ActivationCache, keeps: Keeps) -> Callable[[Tensor, str], Tensor]:
    """The values to write at the z points so that keys keep these shares of weight, as a function (act, point)."""
    changed, new = {}, {}
    for layer, block in enumerate(model.blocks):
        attn, scores, v = block.attn, untouched["attn_scores", layer], untouched["v", layer]
        name = f"blocks.{layer}.attn.hook_z"
        seen = scores > -torch.inf
        blocked = (keeps[layer] == 0) & seen
        blocked &= (seen & ~blocked).any(-1, keepdim=True)  # a query that would see nothing stays as it was
        keep = torch.where(keeps[layer] == 0, 1.0, keeps[layer]).to(scores)
        pattern = attn.score.pattern(scores.masked_fill(blocked, -torch.inf), None)
        if bool((keep < 1).any()):
            pattern = pattern * keep
            if attn.score.row_sums_to_one:
                pattern = pattern / pattern.sum(-1, keepdim=True).clamp_min(1e-30)
        changed[name] = (blocked | (keep < 1)).any(-1).transpose(1, 2)[..., None]
        new[name] = attn.weigh(pattern.to(v.dtype), v)
    # where nothing is blocked, the original value stays, bit for bit
    return lambda z, name: torch.where(changed[name], new[name], z)


def demo(model: HookedTransformer) -> Knockout:
    """Block attention to what followed earlier occurrences, on random tokens that repeat; to the first of vectors."""
    if reads_vectors(model):
        return knock_out_keys(model, demo_texts(model, 4, 8), prediction(model), kind="first")
    sequences = repeated_tokens(model, 4)
    return knock_out_keys(model, sequences.tokens, sequences.metric())
