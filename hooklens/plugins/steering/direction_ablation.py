"""Does the model need a direction? The metric and the loss without it, beside the same without random ones."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.names import Where
from hooklens.core.progress import progress
from hooklens.data.demo_prompts import demo_texts
from hooklens.data.prompts import Prompts, read_pairs, rows_of
from hooklens.model.linear import packed_linears
from hooklens.plugins.patching.activation import check_metric
from hooklens.plugins.steering.ablation_controls import NULLS, random_ablations, second_moment, share_of
from hooklens.plugins.steering.steer import Removing, ablate_direction, stream_sites
from hooklens.plugins.steering.variants import Variants, check_texts, first_layer, unit_controls
from hooklens.results.result import Result, Table
from hooklens.results.statistics import group_numbers, mean_interval, null_p, quantiles
from hooklens.sweeps.many_edits import Hooks

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


@dataclass(frozen=True, eq=False)
class DirectionAblation(Result):
    """The metric and the loss of neutral text with the direction taken out, and with random directions taken out.

    The losses are in nats a token. `share` is how much of the activations' squared length lies along the direction,
    each position counting the same. Random directions are of three `nulls`: isotropic ones, which hold little of the
    stream, so that beating them says little; ones that lie as the activations do; and ones that hold as large a share
    of them as the direction. Directions that were given make one null, "given".
    """

    metric: Float[Tensor, "prompt"]
    base_per_prompt: Float[Tensor, "prompt"]
    random_metric: Float[Tensor, "null draw prompt"]
    neutral_loss: Float[Tensor, "text"]
    base_neutral_loss: Float[Tensor, "text"]
    random_neutral_loss: Float[Tensor, "null draw text"]
    share: float
    random_share: Float[Tensor, "null draw"]
    nulls: list[str]
    group: Int[Tensor, "prompt"]
    sites: list[str]

    @property
    def effect(self) -> float:
        """How far the metric moves when the direction is taken out, mean over prompts."""
        return float((self.metric - self.base_per_prompt).mean())

    @property
    def random_effect(self) -> Float[Tensor, "null draw"]:
        """The same for each random direction."""
        return (self.random_metric - self.base_per_prompt).mean(2)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The interval of `effect`, by a bootstrap over groups of prompts."""
        low, high = mean_interval(self.metric - self.base_per_prompt, group=self.group, level=level)
        return float(low), float(high)

    def random_band(self, level: float = 0.95) -> tuple[Float[Tensor, "null"], Float[Tensor, "null"]]:
        """Between which ends the effects of random directions lie, for each null."""
        low, high = _ends(self.random_effect, level)
        return low, high

    @property
    def against(self) -> list[str]:
        """Where the whole interval lies, for each null: "beyond" 95 % of random directions, "inside", or neither.

        Sizes are compared, whatever the sign. Only "beyond" speaks for the direction, and only "inside" against it: a
        large p alone is "undecided".
        """
        low, high = self.interval()
        most = torch.quantile(self.random_effect.abs(), 0.95, dim=1).tolist()
        found = []
        for end in most:
            beyond, inside = low > end or high < -end, -end <= low and high <= end
            found.append("beyond" if beyond else "inside" if inside else "undecided")
        return found

    @property
    def null_p(self) -> Float[Tensor, "null"]:
        """How often taking out a random direction moves the metric as far, to either side, for each null."""
        null = self.random_effect.abs().T
        return null_p(torch.full_like(null[0], abs(self.effect)), null)

    @property
    def p(self) -> float:
        """The same for the last null: directions that hold as large a share, or those given."""
        return float(self.null_p[-1])

    def table(self, n: int | None = None) -> Table:
        """The direction, and random ones: effect with its ends, p, where the interval lies, share, perplexity."""
        mean, (least, most), paid = (
            self.random_effect.mean(1),
            self.random_band(),
            self.random_neutral_loss.mean((1, 2)),
        )
        rows: list[tuple] = [
            ("nothing", 0.0, None, None, None, "", None, float(self.base_neutral_loss.mean().exp())),
            (
                "this direction",
                self.effect,
                *self.interval(),
                self.p,
                "",
                self.share,
                float(self.neutral_loss.mean().exp()),
            ),
        ]
        shares, p = self.random_share.mean(1), self.null_p
        for i, (null, said) in enumerate(zip(self.nulls, self.against, strict=True)):
            numbers = (float(one[i]) for one in (mean, least, most, p))
            rows.append((f"random, {null}", *numbers, said, float(shares[i]), float(paid[i].exp())))
        columns = ("taken out", "effect", "low", "high", "p", "interval against these", "share", "perplexity")
        return Table(columns, rows).head(n)

    def figure(self) -> Any:
        """The effect on the metric and the rise of the loss, with the ranges of random directions."""
        from hooklens.viz.figures import bars
        from hooklens.viz.panels import panels

        rise = self.neutral_loss - self.base_neutral_loss
        random_rise = (self.random_neutral_loss - self.base_neutral_loss).mean(2)
        moved = self.metric - self.base_per_prompt
        own = (
            (moved, self.random_effect, mean_interval(moved, group=self.group), "metric"),
            (rise, random_rise, mean_interval(rise), "loss of neutral text"),
        )
        drawn = []
        for values, random, ends, name in own:
            both = zip(ends, _ends(random, 0.95), strict=True)
            low, high = (torch.cat([end[None], others]) for end, others in both)
            labels = ["this direction", *(f"random, {null}" for null in self.nulls)]
            bar = torch.cat([values.mean()[None], random.mean(1)])
            drawn.append(bars(bar, low, high, labels, f"Change of the {name}", y_title="change"))
        return panels(drawn)


def _ends(values: Float[Tensor, "null draw"], level: float) -> Float[Tensor, "two null"]:
    return quantiles(values.T, ((1 - level) / 2, (1 + level) / 2))


def direction_ablation(
    model: "HookedTransformer",
    prompts: Prompts,
    direction: Float[Tensor, "width"],
    metric: Any,
    *,
    sites: Where | None = None,
    neutral: Prompts | None = None,
    group: Int[Tensor, "prompt"] | None = None,
    controls: int | Float[Tensor, "draw width"] = 24,
) -> DirectionAblation:
    """What does the model lose when it can no longer use a direction, and would it lose as much without any other?

    The direction is taken out of the stream wherever it stands, or at chosen sites. `neutral` is text whose loss should
    not change; None takes the prompts themselves. `group` has one label a prompt: the interval resamples groups.
    `controls` is a number of random directions of each kind, the same in every call, or the directions.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model()
    >>> seen = direction_ablation(model, [[1, 2], [3, 4]], model.W_U[:, 5], lambda logits: logits[:, -1, 5], controls=9)
    >>> seen.random_effect.shape, len(seen.sites)                              # null draw
    (torch.Size([3, 9]), 6)

    Reference: Arditi et al. (2024), "Refusal in Language Models Is Mediated by a Single Direction", sections 2.4 and 3.
    """
    if direction.ndim != 1:
        raise InputError(f"one direction [width] is taken out and compared, got {list(direction.shape)}")
    where = stream_sites(model) if sites is None else sites
    ablate_direction(model, direction, sites=where)  # refuses what cannot be ablated there
    names = [point.name for point in model.resolve(where)]
    groups, rows = read_pairs(model, prompts, prompts, ()), rows_of(model, prompts, "prompts")
    check_metric(metric, groups)
    number = group_numbers(len(rows), group)
    with torch.no_grad():
        moment = second_moment(model, groups, names)
    wide = direction.detach().double().cpu()
    random, nulls = _controls(controls, moment, wide)
    vectors = torch.cat([wide[None], random.flatten(0, 1)])

    def hooks(index: Int[Tensor, "row"]) -> Hooks:
        return [(name, Removing(vectors[index], "all")) for name in names]

    texts = check_texts(rows if neutral is None else rows_of(model, neutral, "neutral"), "neutral")
    edited, plain = Variants(len(vectors), hooks, first_layer(names)), Variants(1, lambda index: [], 0)
    starts = [1] * len(texts)
    work = (len(vectors) + 1) * (len(rows) + len(texts))
    with torch.no_grad(), packed_linears(rows=1024), progress("ablations", work, unit="prompt") as advance:
        base, seen = (one.metric(model, groups, metric, advance) for one in (plain, edited))
        paid, lost = (one.loss(model, texts, starts, advance) for one in (plain, edited))
    others = [one[1:].view(*random.shape[:2], -1) for one in (seen, lost)]
    shares = float(share_of(moment, wide)), share_of(moment, random).to(seen)
    measured = seen[0], base[0], others[0], lost[0], paid[0], others[1]
    return DirectionAblation(*measured, *shares, nulls, number, names)


def _controls(
    controls: int | Float[Tensor, "draw width"], moment: Float[Tensor, "width width"], direction: Float[Tensor, "width"]
) -> tuple[Float[Tensor, "null draw width"], list[str]]:
    """Random directions by null, and the nulls' names."""
    given = unit_controls(controls, direction, 0)  # refuses what are none
    if isinstance(controls, Tensor):
        return given[None], ["given"]
    return random_ablations(moment, direction, controls, 0), list(NULLS)


def demo(model: "HookedTransformer") -> DirectionAblation:
    """The direction that raises one token's logit, taken out everywhere; its effect on that logit."""
    prompts = demo_texts(model, 4, 4)
    token = 1 % model.cfg.d_vocab_out

    def logit(logits: Float[Tensor, "pair pos d_vocab"]) -> Float[Tensor, "pair"]:
        return logits[:, -1, token]

    everywhere = model.blocks[0].not_a_sum is None  # else the stream cannot be cleared of a direction
    direction, sites = model.W_U[:, token].detach(), None if everywhere else "resid_post"
    return direction_ablation(model, prompts, direction, logit, sites=sites, controls=8)
