"""Does the model need a direction? The metric and the loss after ablating it, compared with random directions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.names import Where
from hooklens.data.demo_prompts import demo_texts
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Prompts, need_tokens, read_pairs
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.activation import check_metric
from hooklens.plugins.steering.ablation_controls import NULLS, random_ablations, second_moment, share_of
from hooklens.plugins.steering.steering_edit import ablate_direction, stream_sites
from hooklens.plugins.steering.variants import Variants, texts_of, unit_controls, values_and_losses
from hooklens.plugins.weights.needs import Needs, needs_tokens
from hooklens.results.result import Result, Table
from hooklens.results.statistics import group_numbers, mean_interval, middle, null_p
from hooklens.sweeps.resume import Resume, resuming


@dataclass(frozen=True, eq=False)
class DirectionAblation(Result):
    """The metric and the loss on neutral text after ablating the direction, and after ablating random directions.

    The losses are in nats per token. `share` is the share of the activations' squared length along the direction, with
    every position weighted equally. There are three `nulls` of random directions: isotropic ones, which contain little
    of the stream, so exceeding them shows little; directions distributed like the activations; and directions with as
    large a share as the direction itself. Directions given by the caller form one null, "given".
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
        """The change of the metric when the direction is ablated, mean over prompts."""
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
        """The interval of the effects of random directions, for each null."""
        return middle(self.random_effect.T, level)

    @property
    def against(self) -> list[str]:
        """The position of the whole interval, for each null: "beyond" 95 % of random directions, "inside", or neither.

        Absolute values are compared. Only "beyond" supports the direction, and only "inside" is evidence against it: a
        large p alone means "undecided".
        """
        low, high = self.interval()
        relations = []
        for end in self.random_effect.abs().quantile(0.95, dim=1).tolist():
            inside = "inside" if -end <= low and high <= end else "undecided"
            relations.append("beyond" if low > end or high < -end else inside)
        return relations

    @property
    def null_p(self) -> Float[Tensor, "null"]:
        """How often ablating a random direction changes the metric as much, in either direction, for each null."""
        null = self.random_effect.abs().T
        return null_p(torch.full_like(null[0], abs(self.effect)), null)

    @property
    def p(self) -> float:
        """`null_p` of the last null: directions with as large a share, or the given ones."""
        return float(self.null_p[-1])

    def table(self, n: int | None = None) -> Table:
        """The direction and the random ones: effect with interval, p, position of the interval, share, perplexity."""
        loss, base_loss = self.neutral_loss.mean(), self.base_neutral_loss.mean()
        rows: list[tuple] = [
            ("nothing", 0.0, None, None, None, "", None, base_loss.exp()),
            ("this direction", self.effect, *self.interval(), self.p, "", self.share, loss.exp()),
        ]
        columns: list[Any] = [self.random_effect.mean(1), *self.random_band(), self.null_p, self.against]
        columns += [self.random_share.mean(1), self.random_neutral_loss.mean((1, 2)).exp()]
        for null, *cells in zip(self.nulls, *columns, strict=True):
            rows.append((f"random, {null}", *cells))
        names = ("ablated", "effect", "low", "high", "p", "interval against these", "share", "perplexity")
        return Table(names, rows).head(n)

    def figure(self) -> Any:
        """The effect on the metric and the increase of the loss, with the ranges of random directions."""
        from hooklens.viz.figures import bars
        from hooklens.viz.small_multiples import panels

        change, rise = self.metric - self.base_per_prompt, self.neutral_loss - self.base_neutral_loss
        random_rise = (self.random_neutral_loss - self.base_neutral_loss).mean(2)
        labels = ["this direction", *(f"random, {null}" for null in self.nulls)]
        figures = []
        for values, random, own, name in (
            (change, self.random_effect, mean_interval(change, group=self.group), "metric"),
            (rise, random_rise, mean_interval(rise), "loss of neutral text"),
        ):
            low, high = (torch.cat([end[None], ends]) for end, ends in zip(own, middle(random.T), strict=True))
            bar = torch.cat([values.mean()[None], random.mean(1)])
            figures.append(bars(bar, low, high, labels, f"Change of the {name}", y_title="change"))
        return panels(figures)


def measure_direction_ablation(
    model: HookedTransformer,
    prompts: Prompts | PromptPairs,
    direction: Float[Tensor, "width"],
    metric: Any = None,
    *,
    sites: Where | None = None,
    neutral: Prompts | None = None,
    controls: int | Float[Tensor, "draw width"] = 24,
    resume: str | Path | Resume | None = None,
) -> DirectionAblation:
    """What does the model lose when it cannot use a direction, and would it lose as much without any other direction?

    The direction is ablated everywhere in the stream, or at chosen sites. `neutral` is text whose loss should not
    change; None uses the prompts themselves. Of `PromptPairs` the clean prompts are used, with their metric and their
    groups, which the interval resamples: `hl.PromptPairs(prompts, None, metric, group=labels)`. `controls` is the
    number of random directions of each kind (the same in every call), or the directions themselves. `resume` names a
    file that keeps finished values of the metric and losses, as in `hl.patch`.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model()
    >>> logit = lambda logits: logits[:, -1, 5]
    >>> ablation = measure_direction_ablation(model, [[1, 2], [3, 4]], model.W_U[:, 5], logit, controls=9)
    >>> ablation.random_effect.shape, len(ablation.sites)                              # null draw
    (torch.Size([3, 9]), 6)

    Reference: Arditi et al. (2024), "Refusal in Language Models Is Mediated by a Single Direction", sections 2.4 and 3.
    """
    need_tokens(
        model, "measure_direction_ablation", "hl.steering.ablate_direction with a metric of the output reads vectors"
    )
    where = stream_sites(model) if sites is None else sites
    ablate_direction(model, direction, sites=where)  # raises if it cannot be ablated there
    if direction.ndim != 1:
        raise InputError(f"direction_ablation needs a single direction [width], got {list(direction.shape)}")
    names = [point.name for point in model.resolve(where)]
    pairs = as_pairs(model, prompts, metric=metric)
    groups = read_pairs(model, pairs.clean, pairs.clean, ())
    check_metric(pairs.metric, groups)
    texts = texts_of(model, pairs.clean if neutral is None else neutral)
    wide = direction.detach().double().cpu()
    with resuming(resume, "measure_direction_ablation") as file:
        moment = second_moment(model, groups, names)
        random, nulls = _controls(controls, moment, wide)
        vectors = torch.cat([torch.zeros_like(wide)[None], wide[None], random.flatten(0, 1)])  # 0 removes nothing
        edits = Variants.of(model, names, vectors, None, "all", asked=(direction, controls))
        on_prompts, on_texts = (edits, groups, pairs.metric), (edits, texts, [1] * len(texts))
        values, losses = values_and_losses(model, on_prompts, on_texts, title="ablations", file=file)
    return DirectionAblation(
        metric=values[1],
        base_per_prompt=values[0],
        random_metric=values[2:].view(*random.shape[:2], -1),
        neutral_loss=losses[1],
        base_neutral_loss=losses[0],
        random_neutral_loss=losses[2:].view(*random.shape[:2], -1),
        share=float(share_of(moment, wide)),
        random_share=share_of(moment, random).to(values),
        nulls=nulls,
        group=group_numbers(len(pairs), pairs.group),
        sites=names,
    )


def _controls(
    controls: int | Float[Tensor, "draw width"], moment: Float[Tensor, "width width"], direction: Float[Tensor, "width"]
) -> tuple[Float[Tensor, "null draw width"], list[str]]:
    """Random directions by null, and the nulls' names."""
    given = unit_controls(controls, direction, 0)  # raises if these are not directions
    if isinstance(controls, Tensor):
        return given[None], ["given"]
    return random_ablations(moment, direction, controls, 0), list(NULLS)


def demo(model: HookedTransformer) -> DirectionAblation | Needs:
    """Ablate the direction that raises one token's logit, everywhere; measure the effect on that logit."""
    if lacks := needs_tokens(model):
        return lacks
    prompts = demo_texts(model, 4, 4)
    token = 1 % model.cfg.d_vocab_out

    def logit(logits: Float[Tensor, "pair pos d_vocab"]) -> Float[Tensor, "pair"]:
        return logits[:, -1, token]

    everywhere = model.blocks[0].not_a_sum is None  # else the stream cannot be cleared of a direction
    direction, sites = model.W_U[:, token].detach(), None if everywhere else "resid_post"
    return measure_direction_ablation(model, prompts, direction, logit, sites=sites, controls=8)
