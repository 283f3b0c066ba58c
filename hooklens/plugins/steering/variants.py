"""Many edits of the same prompts at once: rows of one batch, started at the first layer that is edited."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import InputError
from hooklens.core.hooks import HookFn
from hooklens.core.names import Where, parse
from hooklens.core.progress_bar import Advance
from hooklens.data.prompts import Pairs
from hooklens.generation.sampling import Generation
from hooklens.plugins.patching.grid import in_order
from hooklens.sweeps.measure import Reader

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

Hooks = list[tuple[Where, HookFn]]
Row = Int[Tensor, "_pos"]  # texts of one call differ in length
_TOKENS_AT_ONCE = 2048
_LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Variants:
    """`n` edits of a model: `hooks(index)` gives the hooks of a batch whose row i is edited as variant index[i]."""

    n: int
    hooks: Callable[[Int[Tensor, "row"]], Hooks]
    first_layer: int

    def metric(
        self, model: "HookedTransformer", groups: list[Pairs], metric: Any, advance: Advance
    ) -> Float[Tensor, "variant prompt"]:
        """The metric of every prompt under every edit."""
        parts = []
        for group in groups:
            base = model(group.clean, stop_at_layer=self.first_layer)
            values = []
            for index in self._chunks(group.clean.numel()):
                finals = self._finals(model, base, index).unflatten(0, (len(index), -1))
                values += [Reader(model, group.of(metric), one).base for one in finals]
                advance(len(index) * len(base))
            parts.append(torch.stack(values, 1))
        return in_order(groups, parts).T

    def loss(
        self, model: "HookedTransformer", rows: Sequence[Row], starts: Sequence[int], advance: Advance
    ) -> Float[Tensor, "variant text"]:
        """Nats a token of each text under every edit, from position `start` on."""
        if model.cfg.d_vocab_out < model.cfg.d_vocab:
            raise InputError("the loss of a text needs a logit for every token, and this model has fewer")
        losses = []
        for row, start in zip(rows, starts, strict=True):
            base = model(row[None], stop_at_layer=self.first_layer)
            found = []
            for index in self._chunks(len(row)):
                found.append(self._losses(model, self._finals(model, base, index), row, start))
                advance(len(index))
            losses.append(torch.cat(found))
        return torch.stack(losses, 1)

    def generate(
        self, model: "HookedTransformer", prompts: Sequence[Row], index: Int[Tensor, "variant"], options: dict[str, Any]
    ) -> Generation:
        """Every prompt continued under each of these edits: rows by variant, then prompt."""
        with model.hooks(self.hooks(index.repeat_interleave(len(prompts)))):
            return model.generate([row for _ in index for row in prompts], **options)

    def _chunks(self, tokens: int) -> Sequence[Int[Tensor, "_"]]:
        return torch.arange(self.n).split(max(1, _TOKENS_AT_ONCE // tokens))

    def _finals(
        self, model: "HookedTransformer", base: Float[Tensor, "prompt pos d_model"], index: Int[Tensor, "variant"]
    ) -> Float[Tensor, "row pos d_model"]:
        """The stream that leaves the last block, variant by variant."""
        rows = base.repeat(len(index), 1, 1)
        hooks = self.hooks(index.repeat_interleave(len(base)))
        n = model.cfg.n_layers
        with model.hooks(hooks):
            return model(rows, start_at_layer=self.first_layer, stop_at_layer=n)

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
