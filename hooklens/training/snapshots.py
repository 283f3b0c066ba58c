"""Activations on fixed prompts, captured through hooks while a model trains: how does a pattern come about?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.errors import InputError, WrongType
from hooklens.core.names import axes, resolve
from hooklens.model.transformer import HookedTransformer

LARGEST = 2**28  # bytes of all snapshots of a run

#: What is captured: the full name of a point, and the one head that is kept (None: all).
Captured = dict[str, tuple[str, int | None]]


@dataclass(frozen=True, eq=False)
class Snapshots:
    """Activations on the same prompts after several numbers of steps.

    `snapshots["blocks.0.attn.hook_pattern"]` has the axes `snapshots.axes(name)`: step first, then those of the
    activation. Of a chosen head, as in "blocks.0.attn.hook_pattern L0H1", there is no head axis.
    """

    steps: NDArray
    prompts: list
    values: Mapping[str, NDArray]

    def __getitem__(self, name: str) -> NDArray:
        return self.values[name]

    @property
    def names(self) -> list[str]:
        """What was captured."""
        return list(self.values)

    def axes(self, name: str) -> tuple[str, ...]:
        """The axes of an entry, step first."""
        point, _, head = name.partition(" ")
        return ("step", *(axis for axis in axes(point) if not (head and axis in ("head", "kv_head"))))


class SnapshotTaker:
    """Takes the snapshots of a run.

    >>> from hooklens.testing import tiny_model
    >>> taker = SnapshotTaker(tiny_model(), [("pattern", 0, 1)], torch.tensor([[1, 2, 3]]))
    >>> {name: tuple(value.shape) for name, value in taker.take().items()}
    {'blocks.0.attn.hook_pattern L0H1': (1, 3, 3)}
    """

    def __init__(self, model: HookedTransformer, chosen: Sequence[str | tuple], prompts: Shaped[Tensor, "row pos *d"]):
        self.model, self.prompts = model, prompts.to(model.device)
        self.captured = _captured(model, chosen)

    def take(self) -> dict[str, Tensor]:
        """The chosen activations of the model as it is, on the CPU."""
        points = list(dict.fromkeys(point for point, _ in self.captured.values()))
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            _, cache = self.model.run_with_cache(self.prompts, points, device="cpu", dtype=torch.float32)
        self.model.train(was_training)
        return {name: _of_head(cache[point], point, head) for name, (point, head) in self.captured.items()}

    def check_size(self, times: int) -> dict[str, list[int]]:
        """The shape of each entry; raises if the file would become too large."""
        shapes = {name: list(value.shape) for name, value in self.take().items()}
        size = 4 * times * sum(math.prod(shape) for shape in shapes.values())
        if size > LARGEST:
            raise InputError(
                f"snapshots of {len(shapes)} activations on {len(self.prompts)} prompts at {times} evaluations would "
                f"take {size / 2**30:.2f} GiB, at most {LARGEST / 2**30:.2f} are kept; choose fewer names, single "
                "heads, fewer or shorter prompts, or a smaller evaluate="
            )
        return shapes


def snapshot_prompts(model: HookedTransformer, data: Any, asked: int | Sequence[Sequence[int]]) -> Tensor:
    """The prompts given by the user, or the first rows of the held-out data (of the first batch if there are none)."""
    if not isinstance(asked, int):
        lengths = {len(prompt) for prompt in asked}
        if len(lengths) != 1 or 0 in lengths:
            raise InputError(f"snapshot_prompts are token ids, equally many in each; got lengths {sorted(lengths)}")
        return torch.tensor(asked)
    first = next(data.held_out(asked), None)
    batch = first if first is not None and len(first) else data.batch(0, asked)
    inputs = batch.inputs[:asked]
    return inputs.to(model.dtype) if inputs.is_floating_point() else inputs


def checked_choice(value: Any) -> tuple[str | tuple, ...]:
    """The chosen names as a tuple, each a name, or a tuple of name, layer and head.

    >>> checked_choice(["pattern", ["z", 0, 1]])
    ('pattern', ('z', 0, 1))
    """
    entries = value if isinstance(value, list | tuple) else [None]
    chosen = [_chosen(entry) for entry in entries]
    if None in chosen:
        raise WrongType(
            'snapshots is a list whose entries are names such as "pattern", or lists of a name, a layer and perhaps a '
            f'head such as ["pattern", 0, 1]; got {value!r:.80}'
        )
    return tuple(entry for entry in chosen if entry is not None)


def _chosen(entry: Any) -> str | tuple | None:
    """A name, or one with a layer and perhaps a head; None if it is something else."""
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, list | tuple) or not 1 <= len(entry) <= 3 or not isinstance(entry[0], str):
        return None
    places = entry[1:]
    if any(isinstance(place, bool) or not isinstance(place, Integral) for place in places):
        return None
    return entry[0], *map(int, places)


def checked_prompts(value: Any) -> int | tuple[tuple[int, ...], ...]:
    """A number of rows, or the prompts as tuples of token ids, from lists, an array or a tensor.

    >>> checked_prompts(torch.tensor([[1, 2]])), checked_prompts(3)
    (((1, 2),), 3)
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        return whole("snapshot_prompts", value, 1)
    prompts = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
    if not isinstance(prompts, list | tuple) or not prompts or not all(map(_is_prompt, prompts)):
        raise WrongType(
            "snapshot_prompts is a number of rows of the held-out data, or a list of prompts, each a list of token ids "
            f"such as [[1, 2, 3]]; got {value!r:.80}"
        )
    return tuple(tuple(int(token) for token in row) for row in prompts)


def _is_prompt(row: Any) -> bool:
    """Whether this is a list of token ids, which bool is not."""
    if not isinstance(row, list | tuple):
        return False
    return all(isinstance(token, Integral) and not isinstance(token, bool) for token in row)


def _captured(model: HookedTransformer, chosen: Sequence[str | tuple]) -> Captured:
    points, captured = list(model.hook_points()), {}
    for entry in chosen:
        where, head = (entry[:2], int(entry[2])) if isinstance(entry, tuple) and len(entry) == 3 else (entry, None)
        for point in resolve(where, points):
            n_heads = model.cfg.n_key_value_heads if "kv_head" in axes(point) else model.cfg.n_heads
            if head is not None and (_head_axis(point) is None or not 0 <= head < n_heads):
                raise InputError(f"snapshots: {point} has no head {head}; this model has {n_heads} heads a layer")
            layer = point.split(".")[1] if point.startswith("blocks.") else ""
            captured[point if head is None else f"{point} L{layer}H{head}"] = (point, head)
    return captured


def _head_axis(point: str) -> int | None:
    return next((i for i, axis in enumerate(axes(point)) if axis in ("head", "kv_head")), None)


def _of_head(value: Tensor, point: str, head: int | None) -> Tensor:
    axis = _head_axis(point)
    return value if head is None or axis is None else value.select(axis, head)
