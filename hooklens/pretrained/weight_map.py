"""Declarative maps from a family's weights on the hub to ours: names, order, and how fused layers are split."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import FileRefused
from hooklens.model.config import HookedTransformerConfig
from hooklens.pretrained.hf_config import HFConfig

Names = str | tuple[str, ...]


@dataclass(frozen=True)
class From:
    """A layer on the hub that contains one or several of ours, with their rows one after the other.

    `transposed`: stored as (in, out). `by_head`: rows are ordered by head, and each head has its share of every part.
    """

    name: str
    transposed: bool = False
    by_head: bool = False


@dataclass(frozen=True)
class Piece:
    """One tensor on the hub: the parameters in it, and its shape there."""

    ours: tuple[str, ...]
    how: From
    shape: tuple[int, ...]
    rows: tuple[int, ...]

    def cut(self, weight: Float[Tensor, "..."], n_heads: int) -> dict[str, Float[Tensor, "..."]]:
        """Split the tensor into our parameters, each in its own memory."""
        weight = weight.T if self.how.transposed and weight.ndim == 2 else weight
        if len(self.ours) == 1:
            return {self.ours[0]: weight.contiguous()}
        if self.how.by_head:
            parts = weight.unflatten(0, (n_heads, len(self.ours), -1)).unbind(1)
            return {name: part.flatten(0, 1).clone() for name, part in zip(self.ours, parts, strict=True)}
        parts = weight.split(self.rows)
        return {
            name: part.clone(memory_format=torch.contiguous_format) for name, part in zip(self.ours, parts, strict=True)
        }


@dataclass(frozen=True)
class Family:
    """Everything specific to one model family on the hub: how to read its config, and the names of its layers.

    `outside` and `inside` (a block) map our layers to the hub's, without `.weight` and `.bias`. `ignored` are patterns
    of buffers without weights; `renames` convert other spellings of a name to the usual one.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config: Callable[[HFConfig], HookedTransformerConfig]
    layer: str
    outside: dict[Names, str | From]
    inside: dict[Names, str | From]
    prefix: str = "model."
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    head: str = field(default="lm_head.weight")

    def hub_name(self, layers: Names, block: int | None) -> str | None:
        """The hub's name of these layers of ours in a block, or outside all blocks; None if the family lacks them."""
        table, prefix = (self.outside, "") if block is None else (self.inside, self.layer.format(block))
        return prefix + _as_source(table[layers]).name if layers in table else None

    def usual_names(self, names: Iterable[str]) -> dict[str, str]:
        """Map each name in a file to the usual name in this map; buffers are left out.

        A file saved from the model without its head lacks the prefix of the names.
        """
        usual_of = {}
        for name in names:
            usual = name
            for pattern, replacement in self.renames:
                usual = re.sub(pattern, replacement, usual)
            if not any(re.search(pattern, usual) for pattern in self.ignored):
                usual_of[name] = usual
        if not any(usual.startswith(self.prefix) for usual in usual_of.values()):
            usual_of = {k: v if v == self.head else self.prefix + v for k, v in usual_of.items()}
        return usual_of

    def pieces(self, cfg: HookedTransformerConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, Piece]:
        """Every tensor that a file must contain, by its usual name, for parameters of these shapes."""
        pieces = self._pieces("", "", self.outside, shapes)
        for layer in range(cfg.n_layers):
            pieces |= self._pieces(f"blocks.{layer}.", self.layer.format(layer), self.inside, shapes)
        held = {name for piece in pieces.values() for name in piece.ours}
        if left := sorted(set(shapes) - held):
            raise FileRefused(f"the {self.name} family has no source for {', '.join(left[:4])}")
        return pieces

    def _pieces(
        self, ours: str, theirs: str, table: dict[Names, str | From], shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, Piece]:
        pieces = {}
        for names, source in table.items():
            how = _as_source(source)
            layers = (names,) if isinstance(names, str) else names
            for suffix in ("weight", "bias"):
                here = tuple(f"{ours}{name}.{suffix}" for name in layers)
                if all(name in shapes for name in here):
                    rows = tuple(shapes[name][0] for name in here)
                    shape = (sum(rows), *shapes[here[0]][1:])
                    shape = shape[::-1] if how.transposed else shape
                    pieces[f"{theirs}{how.name}.{suffix}"] = Piece(here, how, shape, rows)
        return pieces


def _as_source(source: str | From) -> From:
    return source if isinstance(source, From) else From(source)
