"""Which heads lower the logit of the token that they look at, and what does the model's calibration owe to them?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.data.prompts import Prompts
from hooklens.data.repeated import repeated_tokens
from hooklens.model.linear import is_plain, packed_linears
from hooklens.plugins.heads.copying import refuse_post_norm
from hooklens.plugins.heads.mediation import check_heads, mean_z
from hooklens.plugins.heads.scores import one_length
from hooklens.result import Result, Table
from hooklens.statistics import mean_interval, q_values, sign_flip_p

if TYPE_CHECKING:
    from hooklens.core.cache import ActivationCache
    from hooklens.model.transformer import HookedTransformer

PerSequence = Float[Tensor, "sequence layer head"]
_BINS = 15
_DRAWS = 1000


@dataclass(frozen=True, eq=False)
class CopySuppression(Result):
    """What each head does to the token that it looks at, on its direct path, and to calibration where it was ablated.

    `direct` is what the head adds to that token's logit, over the mean of all tokens, weighed by the attention: below
    0 it suppresses. `control` is the same for another token of the prompt, which the head does not look at. `ece` is
    the expected calibration error of the untouched run; `ece_change` (with `low` and `high`, bootstrapped over
    sequences) what it becomes without each of `ablated`; `loss_change` the loss beside it.
    """

    direct: PerSequence
    control: PerSequence
    ablated: list[str]
    ece: float
    ece_change: Float[Tensor, "chosen"]
    low: Float[Tensor, "chosen"]
    high: Float[Tensor, "chosen"]
    loss_change: Float[Tensor, "sequence chosen"]

    @property
    def anti(self) -> Float[Tensor, "layer head"]:
        """How much more a head lowers the token it looks at than another one: above 0 is suppression."""
        return (self.control - self.direct).mean(0)

    @property
    def q(self) -> Float[Tensor, "layer head"]:
        """Benjamini-Hochberg over heads of "no difference from the control", by sign flips of whole sequences."""
        return q_values(sign_flip_p(self.control - self.direct))

    def order(self) -> list[tuple[int, int]]:
        """Every (layer, head), the strongest suppression first."""
        return [
            divmod(i, self.anti.shape[1]) for i in self.anti.flatten().argsort(descending=True, stable=True).tolist()
        ]

    def top(self, k: int = 10) -> Table:
        """The `k` heads that suppress most."""
        return self.table(k)

    def table(self, n: int | None = 12) -> Table:
        """One row a head: its effect on the token looked at and on another, their difference, calibration."""
        (low, high), q = mean_interval(self.control - self.direct), self.q
        rows = []
        for i, j in self.order()[:n]:
            name = f"L{i}H{j}"
            at = self.ablated.index(name) if name in self.ablated else None
            change = (
                (None, None, None)
                if at is None
                else tuple(float(x[at]) for x in (self.ece_change, self.low, self.high))
            )
            each = (self.direct.mean(0), self.control.mean(0), low, high, q)
            rows.append((name, *(float(one[i, j]) for one in each), *change))
        columns = ("token looked at", "another token", "anti low", "anti high", "q", "ECE change", "low", "high")
        return Table(("head", *columns), rows)

    def figure(self) -> Any:
        """Layer by head: orange lowers the token it looks at, blue raises it."""
        from hooklens.viz.figures import heatmap

        rows = [f"L{i}" for i in range(len(self.anti))]
        title = "Direct effect on the logit of the token looked at"
        return heatmap(-self.anti, y=rows, title=title, x_title="head", y_title="layer", colourbar="logit")


def copy_suppression(
    model: "HookedTransformer",
    prompts: Prompts | None = None,
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    n: int = 8,
    seed: int = 0,
) -> CopySuppression:
    """Which heads are negative: they lower what they look at? And is the model better or worse calibrated for it?

    The direct effect is exact, final norm included (a final soft cap is not): the head's output against its mean, all
    other components held. `heads` (by default the five that suppress most) are then ablated by their mean, and the
    error of the confidence in the likeliest token is compared. `prompts` of one length, else random tokens that
    repeat.

    >>> from hooklens.testing import induction_model
    >>> found = copy_suppression(induction_model(), heads=[(1, 1)])
    >>> bool(found.direct.mean(0)[1, 1] > 5), found.direct.mean(0)[0].tolist(), found.ablated
    (True, [0.0, 0.0], ['L1H1'])

    Reference: McDougall et al. (2023), "Copy Suppression", sections 2 and 3; Guo et al. (2017), "On Calibration of
    Modern Neural Networks", equation 3 (expected calibration error, here with 15 bins).
    """
    refuse_post_norm(model)
    tokens = repeated_tokens(model, n, seed=seed).tokens if prompts is None else one_length(model, prompts)
    names = ["z", "pattern", *(name for name in model.hook_names() if name.endswith("ln1_post.hook_scale"))]
    with torch.no_grad(), packed_linears(rows=1024):
        stream, cache = model.run_with_cache(tokens, names, stop_at_layer=model.cfg.n_layers)
        mean, other = mean_z(model, cache, None, tokens), _another(tokens, seed)
        both = [_direct(model, cache, mean, stream, tokens, other, layer) for layer in range(model.cfg.n_layers)]
        direct, control = (torch.stack([one[i] for one in both], 1) for i in range(2))
        chosen = _most_negative(direct - control) if heads is None else check_heads(model, heads)
        base = _confidence(model, tokens, [])
        edited = [_confidence(model, tokens, [_mean_out(mean, *head)]) for head in chosen]
    ece, changes, low, high = _ece_changes(base, edited, seed)
    loss_change = torch.stack([one[2] - base[2] for one in edited], 1)
    return CopySuppression(direct, control, [f"L{a}H{b}" for a, b in chosen], ece, changes, low, high, loss_change)


def _another(tokens: Int[Tensor, "sequence pos"], seed: int) -> Int[Tensor, "sequence pos"]:
    """For each key the token of another position of its prompt, drawn once."""
    generator = torch.Generator().manual_seed(seed)
    n = tokens.shape[1]
    shift = torch.randint(1, max(2, n), tokens.shape, generator=generator).to(tokens.device)
    return tokens.gather(1, (torch.arange(n, device=tokens.device) + shift) % n)


def _direct(
    model, cache: "ActivationCache", mean: dict[int, Tensor], stream: Tensor, tokens: Tensor, other: Tensor, layer: int
) -> tuple[Float[Tensor, "sequence head"], Float[Tensor, "sequence head"]]:
    """What each head adds to the logit of its strongest key's token (not the first's), and of another token."""
    block, z = model.blocks[layer], cache["z", layer]
    moved = block.attn.results(z) - block.attn.results(mean[layer].to(z))
    if block.ln1_post is not None:
        moved = block.ln1_post.linearised(moved, cache[f"blocks.{layer}.ln1_post.hook_scale"][:, :, None])
    weight, key = cache["pattern", layer][..., 1:].max(-1)  # position 0 is where heads rest
    weight, key = weight.transpose(1, 2), (key + 1).transpose(1, 2)
    weight = weight * (torch.arange(tokens.shape[1], device=tokens.device) > 0)[:, None]
    with_head, without = stream[:, :, None], stream[:, :, None] - moved
    if model.ln_final is not None:
        with_head, without = model.ln_final(with_head), model.ln_final(without)
    change = with_head - without
    linear = model.unembed.linear
    unit = torch.eye(change.shape[-1]).to(change)
    W = linear.weight if is_plain(linear) else (linear(unit) - linear(torch.zeros_like(unit))).T
    out, rows = [], torch.arange(len(tokens), device=tokens.device)[:, None, None]
    for ids in (tokens, other):
        column = W[ids[rows, key]] - W.mean(0)
        effect = (change * column).sum(-1) * weight
        out.append(effect.sum(1) / weight.sum(1).clamp_min(torch.finfo(effect.dtype).tiny))
    return out[0], out[1]


def _most_negative(difference: PerSequence) -> list[tuple[int, int]]:
    order = difference.mean(0).flatten().argsort(stable=True)[:5].tolist()
    return [divmod(i, difference.shape[2]) for i in order]


def _mean_out(mean: dict[int, Tensor], layer: int, head: int) -> tuple:
    def edit(z: Tensor, hook: Any) -> Tensor:
        z[:, :, head] = mean[layer][:, :, head]
        return z

    return ("z", layer), edit


def _confidence(
    model: "HookedTransformer", tokens: Tensor, hooks: list
) -> tuple[Float[Tensor, "sequence query"], Float[Tensor, "sequence query"], Float[Tensor, "sequence"]]:
    """The likeliest token's probability, whether it came, and the loss of each sequence."""
    parts = []
    for row in tokens.split(4):  # logits of a few sequences at a time
        log_probs = model.run_with_hooks(row, fwd_hooks=hooks)[:, :-1].log_softmax(-1)
        best, token = log_probs.max(-1)
        target = row[:, 1:]
        loss = -log_probs.gather(2, target[..., None])[..., 0].mean(1)
        parts.append((best.exp(), (token == target).to(best), loss))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def _ece_changes(base: tuple, edited: list[tuple], seed: int) -> tuple[float, Tensor, Tensor, Tensor]:
    """ECE, its change without each head, and both ends of the change: all sequences are drawn again, runs together."""
    n = len(base[0])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (_DRAWS, n), generator=generator)
    weights = torch.stack([torch.ones(n), *(torch.bincount(row, minlength=n) for row in drawn)]).to(base[0])
    errors = [calibration_error(confidence, right, weights) for confidence, right, _ in (base, *edited)]
    changes = torch.stack([error - errors[0] for error in errors[1:]], 1)
    low, high = changes[1:].quantile(torch.tensor([0.025, 0.975]).to(changes), dim=0)
    return float(errors[0][0]), changes[0], low, high


def calibration_error(
    confidence: Float[Tensor, "sequence query"],
    right: Float[Tensor, "sequence query"],
    weights: Float[Tensor, "draw sequence"],
) -> Float[Tensor, "draw"]:
    """The mean distance between confidence and how often it is right, over bins of confidence; one a weighting.

    >>> calibration_error(torch.tensor([[0.9, 0.9]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 1))
    tensor([0.4000])
    """
    bins = torch.nn.functional.one_hot((confidence * _BINS).long().clamp(0, _BINS - 1), _BINS).to(confidence)
    gap = torch.einsum("sq,sqb->sb", confidence - right, bins)
    return (weights @ gap).abs().sum(1) / (weights.sum(1) * confidence.shape[1])


def demo(model: "HookedTransformer") -> CopySuppression:
    """Four short sequences that repeat."""
    return copy_suppression(model, n=4)
