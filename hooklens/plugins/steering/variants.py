"""Many edits of the same prompts at once: rows of one batch, started at the first layer that is edited."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import InputError
from hooklens.core.names import parse
from hooklens.core.progress_bar import Advance
from hooklens.data.prompts import Pairs
from hooklens.generation.sampling import Generation
from hooklens.plugins.patching.grid import in_order
from hooklens.sweeps.many_edits import Edits

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

Row = Int[Tensor, "_pos"]  # texts of one call differ in length
_LOGITS_AT_ONCE = 2**25


class Variants(Edits):
    """Edits of a model, and what it says with them: the metric of prompts, the loss of texts, continuations."""

    def metric(
        self, model: "HookedTransformer", groups: list[Pairs], metric: Any, advance: Advance
    ) -> Float[Tensor, "variant prompt"]:
        """The metric of every prompt under every edit."""
        return in_order(groups, [self.values(model, one.clean, one.of(metric), advance).T for one in groups]).T

    def loss(
        self, model: "HookedTransformer", rows: Sequence[Row], starts: Sequence[int], advance: Advance
    ) -> Float[Tensor, "variant text"]:
        """Nats a token of each text under every edit, from position `start` on."""
        if model.cfg.d_vocab_out < model.cfg.d_vocab:
            raise InputError("the loss of a text needs a logit for every token, and this model has fewer")
        losses = []
        for row, start in zip(rows, starts, strict=True):
            finals = (some[:, 0] for some in self.streams(model, row[None], advance))
            losses.append(torch.cat([self._losses(model, some, row, start) for some in finals]))
        return torch.stack(losses, 1)

    def generate(
        self, model: "HookedTransformer", prompts: Sequence[Row], index: Int[Tensor, "variant"], options: dict[str, Any]
    ) -> Generation:
        """Every prompt continued under each of these edits: rows by variant, then prompt."""
        with model.hooks(self.hooks(index.repeat_interleave(len(prompts)))):
            return model.generate([row for _ in index for row in prompts], **options)

    def _losses(
        self, model: "HookedTransformer", finals: Float[Tensor, "row pos d_model"], row: Row, start: int
    ) -> Float[Tensor, "row"]:
        targets, found = row[start:], []
        for some in finals[:, start - 1 : -1].split(max(1, _LOGITS_AT_ONCE // (len(targets) * model.cfg.d_vocab_out))):
            found.append(nats(model.read_out(some), targets.expand(len(some), -1)).mean(1))
        return torch.cat(found)


def nats(logits: Float[Tensor, "row pos d_vocab"], targets: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos"]:
    """Minus the log-probability of each target, in float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def first_layer(names: Sequence[str]) -> int:
    """The first layer that these points lie in."""
    layers = [site.layer for site in map(parse, names) if site is not None and site.layer is not None]
    if len(layers) < len(names):
        raise InputError(f"a sweep edits points inside blocks, which {names[0]} is not; use resid_pre of layer 0")
    return min(layers)


def check_texts(rows: Sequence[Row], name: str) -> list[Row]:
    """Texts long enough to have a loss."""
    short = [i for i, row in enumerate(rows) if len(row) < 2]
    if short:
        raise InputError(f"{name} needs texts of at least two tokens to have a loss, and number {short[0]} has one")
    return list(rows)


def unit_controls(
    controls: int | Float[Tensor, "draw *given"], direction: Float[Tensor, "*point"], seed: int
) -> Float[Tensor, "_draw *point"]:
    """Control directions of length 1 (at each layer and head, where there are several): so many at random, or given.

    >>> unit_controls(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0).tolist()
    [[0.6, 0.8]]
    """
    here = list(direction.shape)
    if not isinstance(controls, Tensor):
        if isinstance(controls, bool) or not isinstance(controls, int) or controls < 1:
            raise InputError(
                f"controls is a number of random directions, at least 1, or the directions; got {controls!r:.80}"
            )
        generator = seeded(seed)
        controls = torch.randn(controls, *here, generator=generator, dtype=torch.float64)
    if list(controls.shape[1:]) != here or not len(controls):
        raise InputError(
            f"control directions are [draw {' '.join(map(str, here))}], at least one, got {list(controls.shape)}"
        )
    wide = controls.detach().double().cpu()
    size = wide.norm(dim=-1, keepdim=True)
    if not bool(((size > 0).squeeze(-1) | (direction.cpu().norm(dim=-1) == 0)).all()):
        raise InputError("a control direction is 0 and points nowhere; leave it out")
    return wide / torch.where(size > 0, size, 1.0)
