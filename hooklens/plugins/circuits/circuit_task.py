"""What a model is asked: prompt pairs in its own tokens, and its own metric. Two models can so be asked the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.prompts import Prompts
from hooklens.metrics import ReadingMetric


@dataclass(frozen=True)
class Task:
    """Prompt pairs and the metric that one model is judged by. Two models get two tasks, made from the same texts.

    >>> task = Task([[1, 2], [3, 4], [5, 6]], [[1, 1], [3, 3], [5, 5]], lambda logits: logits[:, -1, 0])
    >>> len(task), task.part([0, 2]).clean
    (3, [[1, 2], [5, 6]])

    `group` says which pairs share names or a sentence, as in `faithfulness`. A plain function as metric sees the pairs
    of one half at a time, so that it must not hold anything pair by pair; the built-in metrics may.
    """

    clean: Prompts
    corrupted: Prompts | None
    metric: Any
    group: Int[Tensor, "pair"] | None = None

    def __len__(self) -> int:
        return len(_each(self.clean))

    def part(self, index: Sequence[int]) -> "Task":
        """Some of the pairs, each with its own part of the metric."""
        rows = torch.as_tensor(index, dtype=torch.long)
        metric = self.metric
        if isinstance(metric, ReadingMetric) and len(metric.reads.pos) > 1:
            if len(metric.reads.pos) != len(self):
                raise InputError(
                    f"the metric was made for {len(metric.reads.pos)} pairs, and the task has {len(self)}; give as "
                    "many answers as prompts, or one for all"
                )
            metric = metric.pairs(rows)
        corrupted = None if self.corrupted is None else _some(self.corrupted, index)
        group = None if self.group is None else self.group[rows.to(self.group.device)]
        return Task(_some(self.clean, index), corrupted, metric, group)


def _each(prompts: Prompts) -> Sequence[Any]:
    """The prompts one by one; a text or a row of token ids is one prompt."""
    if isinstance(prompts, str) or not len(prompts):
        return [prompts]
    first: Any = prompts[0]
    single = first.ndim == 0 if isinstance(first, Tensor) else isinstance(first, int)
    return [prompts] if single else list(prompts)


def _some(prompts: Prompts, index: Sequence[int]) -> list[Any]:
    each = _each(prompts)
    if len(each) <= max(index):
        raise InputError(f"a task holds as many corrupted prompts as clean ones, and one of its lists has {len(each)}")
    return [each[i] for i in index]
