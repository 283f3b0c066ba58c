"""The effect of steering and its cost: effect and fluency over coefficients, compared with random directions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.errors import InputError, WrongType
from hooklens.core.names import Where
from hooklens.data.demo_prompts import demo_texts
from hooklens.data.prompt_pairs import PromptPairs, as_pairs
from hooklens.data.prompts import Prompts, need_tokens, read_pairs, reads_vectors
from hooklens.generation.sampling import Generation
from hooklens.model.ids import show, show_text
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.activation import check_metric
from hooklens.plugins.steering.coefficient_result import CoefficientSweep
from hooklens.plugins.steering.positions import Positions, check_positions, checked
from hooklens.plugins.steering.steering_edit import Direction, finite_numbers, steer
from hooklens.plugins.steering.variants import (
    Row,
    Variants,
    continuation_loss,
    repeated,
    texts_of,
    unit_controls,
    values_and_losses,
)
from hooklens.plugins.weights.needs import Needs
from hooklens.results.statistics import group_numbers
from hooklens.sweeps.resume import Resume, resuming


@dataclass(frozen=True, eq=False)
class SweepSettings:
    """Settings of a coefficient sweep.

    `controls` is the number of random directions, or the directions themselves, `[draw ...]`; they are scaled to the
    direction's length, separately for each layer and head if it has these axes. `written` is how many of them also
    generate text. `group` has one label per prompt: intervals resample groups. `resume` names a file that keeps
    finished values of the metric and losses, as in `hl.patch`; continuations are generated again.
    """

    controls: int | Float[Tensor, "draw *point"] = 24
    written: int = 2
    new_tokens: int = 24
    temperature: float = 1.0
    positions: Positions = "all"
    group: Int[Tensor, "prompt"] | None = None
    seed: int = 0
    resume: str | Path | Resume | None = None


def sweep_coefficients(
    model: HookedTransformer,
    prompts: Prompts | PromptPairs,
    direction: Direction,
    coefficients: Sequence[float | int],
    metric: Any = None,
    *,
    site: Where,
    neutral: Prompts | None = None,
    settings: SweepSettings | None = None,
) -> CoefficientSweep:
    """How does the metric depend on the coefficient, what is the cost in fluency, and would any direction do the same?

    Every number is reported with that of random directions of the same length. The metric is measured on the steered
    prompts; then each prompt is continued with steering. `direction` is as in `steer`: one vector, or one per layer,
    and at heads one per head; one coefficient scales all of them. `neutral` is text whose likelihood should not change,
    steered at every position; None uses the unsteered model's own continuations. Of `PromptPairs` the clean prompts are
    used, with their metric and groups.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.metrics import logit_diff
    >>> model = tiny_model(); metric = logit_diff(model, answer=3, wrong_answer=4)
    >>> few = SweepSettings(controls=4, written=1, new_tokens=3)
    >>> sweep = sweep_coefficients(model, [[1, 2], [5, 6]], model.W_U[:, 3] - model.W_U[:, 4], [0, 4], metric,
    ...                           site=("resid_post", 1), settings=few)
    >>> sweep.effect[0].item(), sweep.effect[1].item() > 0, sweep.random_effect.shape     # draw coefficient
    (0.0, True, torch.Size([4, 2]))

    Reference: Turner et al. (2023), "Activation Addition"; Rimsky et al. (2023), "Steering Llama 2 via Contrastive
    Activation Addition", section 5 (effect over multipliers, and the effect on other abilities).
    """
    need_tokens(model, "sweep_coefficients", "hl.steer with a metric of the output reads vectors")
    settings = SweepSettings() if settings is None else settings
    if not isinstance(settings, SweepSettings):
        raise WrongType(f"settings is a SweepSettings(...), got {settings!r:.60}")
    settings = replace(settings, positions=checked(settings.positions))
    plan = _planned(model, direction, coefficients, site, settings)
    pairs = as_pairs(model, prompts, metric=metric, group=settings.group)
    rows, groups = pairs.clean, read_pairs(model, pairs.clean, pairs.clean, ())
    check_positions(settings.positions, lengths := [len(row) for row in rows])
    check_metric(pairs.metric, groups)
    with resuming(settings.resume, "SweepSettings") as file:
        texts, losses, repeats = _written(model, plan, rows, settings)
        read, starts = texts.tokens[: len(rows)], lengths
        if neutral is not None:
            read = texts_of(model, neutral)
            starts = [1] * len(read)
        on_prompts, on_texts = (plan.edits, groups, pairs.metric), (plan.everywhere, read, starts)
        values, neutral_losses = values_and_losses(model, on_prompts, on_texts, title="coefficients", file=file)
    new_texts = texts.texts or [" ".join(show(model, ids)) for ids in texts.new_tokens]
    by_edit = [new_texts[i : i + len(rows)] for i in range(0, len(new_texts), len(rows))]
    return CoefficientSweep(
        plan.coefficients.to(values),
        *plan.split(values),
        *plan.split(losses),
        *plan.split(neutral_losses),
        *plan.split(repeats)[:2],
        prompts=[show_text(model, row) for row in rows],
        texts=[by_edit[i] for i in plan.of[0].tolist()],
        base_texts=by_edit[0],
        group=group_numbers(len(rows), pairs.group),
        site=", ".join(point.name for point in model.resolve(site)),
        positions=str(settings.positions),
        neutral="the unsteered model's continuations" if neutral is None else "given",
    )


@dataclass(frozen=True)
class _Plan:
    """The runs of a sweep: edit 0 adds nothing. `of` gives the edit of the direction (row 0) or of a random one at each
    coefficient; coefficient 0 is edit 0."""

    coefficients: Float[Tensor, "coefficient"]
    of: Int[Tensor, "kind coefficient"]
    edits: Variants
    everywhere: Variants

    def split(self, values: Float[Tensor, "edit x"]) -> tuple[Tensor, Tensor, Tensor]:
        """Split into the direction at every coefficient, no steering, and every random direction in `values`."""
        known = self.of[1:][self.of[1:].amax(1) < len(values)]
        return values[self.of[0]], values[0], values[known]


def _planned(
    model: HookedTransformer,
    direction: Tensor,
    coefficients: Sequence[float | int],
    site: Where,
    settings: SweepSettings,
) -> _Plan:
    if settings.positions == "generated":
        raise InputError("the metric is read on prompts, where positions='generated' adds nothing; use slice(-1, None)")
    steer(model, direction, site=site, positions=settings.positions)  # raises if it cannot be added there
    amounts = finite_numbers("coefficients are a row of at least one number", coefficients, dims=(1,)).double().cpu()
    wide = direction.detach().double().cpu()
    controls = unit_controls(settings.controls, wide, settings.seed) * wide.norm(dim=-1, keepdim=True)
    directions, used = torch.cat([wide[None], controls]), (amounts != 0).nonzero().flatten()
    of = torch.zeros(len(directions), len(amounts), dtype=torch.long)
    of[:, used] = torch.arange(1, 1 + len(directions) * len(used)).view(len(directions), -1)
    vectors = torch.einsum("c,k...->kc...", amounts[used], directions).flatten(0, 1)
    vectors = torch.cat([torch.zeros_like(wide)[None], vectors])
    asked = (direction, amounts, settings.controls, settings.seed)
    at_positions, everywhere = (
        Variants.of(model, site, vectors, torch.ones(()), positions, asked=asked)
        for positions in (settings.positions, "all")
    )
    return _Plan(amounts, of, at_positions, everywhere)


def _written(
    model: HookedTransformer, plan: _Plan, rows: list[Row], settings: SweepSettings
) -> tuple[Generation, Float[Tensor, "edit prompt"], Float[Tensor, "edit prompt"]]:
    """The continuations of every prompt under the first edits, the unsteered model's loss on them, and repeats."""
    n = 1 + int(plan.of[: 1 + whole("written", settings.written)].amax())
    options = {"max_new_tokens": settings.new_tokens, "temperature": settings.temperature, "seed": settings.seed}
    texts = plan.edits.generate(model, rows, torch.arange(n), options)
    losses = continuation_loss(model, texts).view(n, len(rows))
    return texts, losses, torch.tensor([repeated(ids) for ids in texts.new_tokens]).to(losses).view(n, len(rows))


def demo(model: HookedTransformer) -> CoefficientSweep | Needs:
    """A random direction after the first block, at three coefficients, and its effect on the logit of token 1."""
    if not model.cfg.causal or model.cfg.d_vocab_out != model.cfg.d_vocab or reads_vectors(model):
        return Needs("a model that can continue text")
    new_tokens = min(3, model.cfg.n_ctx - 1)
    prompts = demo_texts(model, 4, min(4, model.cfg.n_ctx - new_tokens))
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(model.cfg.d_model, generator=generator, dtype=torch.float64)

    def first_logit(logits: Float[Tensor, "pair pos d_vocab"]) -> Float[Tensor, "pair"]:
        return logits[:, -1, 1 % model.cfg.d_vocab_out]

    few = SweepSettings(controls=4, written=1, new_tokens=new_tokens)
    coefficients, site = (-1.0, 0.0, 1.0), ("resid_post", 0)
    return sweep_coefficients(model, prompts, direction, coefficients, first_logit, site=site, settings=few)
