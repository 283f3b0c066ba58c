"""Does the model need a direction? The metric and the loss without it, beside the same without random ones."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.names import Where
from hooklens.data.prompts import Prompts, read_pairs, rows_of
from hooklens.model.linear import packed_linears
from hooklens.plugins.patching.activation import check_metric
from hooklens.plugins.steering.steer import ablate_direction, removing, stream_sites
from hooklens.plugins.steering.variants import Hooks, Variants, check_texts, first_layer, unit_controls
from hooklens.progress import progress
from hooklens.result import Result, Table
from hooklens.statistics import mean_interval, null_p

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


@dataclass(frozen=True, eq=False)
class DirectionAblation(Result):
    """The metric and the loss of neutral text with the direction taken out, and with random directions taken out.

    The losses are in nats a token. A random direction of many dimensions holds little of the stream, so that taking it
    out should change little: it shows what the procedure does, not what another meaningful direction would do.
    """

    metric: Float[Tensor, "prompt"]
    base: Float[Tensor, "prompt"]
    random_metric: Float[Tensor, "draw prompt"]
    neutral_loss: Float[Tensor, "text"]
    base_neutral_loss: Float[Tensor, "text"]
    random_neutral_loss: Float[Tensor, "draw text"]
    sites: list[str]

    @property
    def effect(self) -> float:
        """How far the metric moves when the direction is taken out, mean over prompts."""
        return float((self.metric - self.base).mean())

    @property
    def random_effect(self) -> Float[Tensor, "draw"]:
        """The same for each random direction."""
        return (self.random_metric - self.base).mean(1)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The interval of `effect`, by a bootstrap over prompts."""
        low, high = mean_interval(self.metric - self.base, level=level)
        return float(low), float(high)

    @property
    def p(self) -> float:
        """How often taking out a random direction moves the metric as far, to either side."""
        return float(null_p(torch.tensor(abs(self.effect)), self.random_effect.abs()))

    def table(self, n: int | None = None) -> Table:
        """The direction, and random ones: effect, its ends, p, and the perplexity of neutral text."""
        random, losses = self.random_effect, self.random_neutral_loss.mean(1)
        band = torch.quantile(random, torch.tensor([0.025, 0.975], dtype=random.dtype)).tolist()
        rows = [
            ("nothing", 0.0, None, None, None, float(self.base_neutral_loss.mean().exp())),
            ("this direction", self.effect, *self.interval(), self.p, float(self.neutral_loss.mean().exp())),
            ("random directions", float(random.mean()), *band, None, float(losses.mean().exp())),
        ]
        return Table(("taken out", "effect", "low", "high", "p", "perplexity of neutral text"), rows).head(n)

    def figure(self) -> Any:
        """The effect on the metric and the rise of the loss, with the ranges of random directions."""
        from hooklens.viz.figures import bars
        from hooklens.viz.panels import panels

        rise = self.neutral_loss - self.base_neutral_loss
        random_rise = (self.random_neutral_loss - self.base_neutral_loss).mean(1)
        drawn = []
        parts = ((self.metric - self.base, self.random_effect, "metric"), (rise, random_rise, "loss of neutral text"))
        for own, random, name in parts:
            low, high = mean_interval(own)
            ends = torch.quantile(random, torch.tensor([0.025, 0.975], dtype=random.dtype))
            values = torch.stack([own.mean(), random.mean()])
            bounds = torch.stack([low, ends[0]]), torch.stack([high, ends[1]])
            labels = ["this direction", "random directions"]
            drawn.append(bars(values, *bounds, labels, f"Change of the {name}", y_title="change"))
        return panels(drawn)


def direction_ablation(
    model: "HookedTransformer",
    prompts: Prompts,
    direction: Float[Tensor, "width"],
    metric: Any,
    *,
    sites: Where | None = None,
    neutral: Prompts | None = None,
    controls: int | Float[Tensor, "draw width"] = 24,
    seed: int = 0,
) -> DirectionAblation:
    """What does the model lose when it can no longer use a direction, and would it lose as much without any other?

    The direction is taken out of the stream wherever it stands, or at chosen sites. `neutral` is text whose loss should
    not change; None takes the prompts themselves. `controls` is a number of random directions, or the directions.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model()
    >>> seen = direction_ablation(model, [[1, 2], [3, 4]], model.W_U[:, 5], lambda logits: logits[:, -1, 5], controls=9)
    >>> seen.random_effect.shape, len(seen.sites)
    (torch.Size([9]), 6)

    Reference: Arditi et al. (2024), "Refusal in Language Models Is Mediated by a Single Direction", sections 2.4 and 3.
    """
    if direction.ndim != 1:
        raise InputError(f"one direction [width] is taken out and compared, got {list(direction.shape)}")
    where = stream_sites(model) if sites is None else sites
    ablate_direction(model, direction, sites=where)  # refuses what cannot be ablated there
    names = [point.name for point in model.resolve(where)]
    wide = direction.detach().double().cpu()
    vectors = torch.cat([wide[None], unit_controls(controls, wide, seed)])

    def hooks(index: Int[Tensor, "row"]) -> Hooks:
        return [(name, removing(vectors[index], "all")) for name in names]

    groups = read_pairs(model, prompts, prompts, ())
    check_metric(metric, groups)
    rows = rows_of(model, prompts, "prompts")
    texts = check_texts(rows if neutral is None else rows_of(model, neutral, "neutral"), "neutral")
    edited, plain = Variants(len(vectors), hooks, first_layer(names)), Variants(1, lambda index: [], 0)
    starts = [1] * len(texts)
    work = (len(vectors) + 1) * (len(rows) + len(texts))
    with torch.no_grad(), packed_linears(rows=1024), progress("ablations", work, unit="prompt") as advance:
        base, seen = (one.metric(model, groups, metric, advance) for one in (plain, edited))
        paid, lost = (one.loss(model, texts, starts, advance) for one in (plain, edited))
    return DirectionAblation(seen[0], base[0], seen[1:], lost[0], paid[0], lost[1:], names)


def demo(model: "HookedTransformer") -> DirectionAblation:
    """The direction that raises one token's logit, taken out everywhere; its effect on that logit."""
    generator = torch.Generator().manual_seed(0)
    n = min(4, model.cfg.n_ctx)
    prompts = torch.randint(model.cfg.d_vocab, (4, n), generator=generator).to(model.device)
    token = 1 % model.cfg.d_vocab_out

    def logit(logits: Float[Tensor, "pair pos d_vocab"]) -> Float[Tensor, "pair"]:
        return logits[:, -1, token]

    post = getattr(model.blocks[0], "renorms_stream", False)  # the stream cannot be cleared of a direction there
    direction, sites = model.W_U[:, token].detach(), "resid_post" if post else None
    return direction_ablation(model, prompts, direction, logit, sites=sites, controls=8)
