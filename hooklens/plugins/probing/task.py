"""The data of a probe: prompts, the positions that are read, a label for each, and groups of related examples."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.errors import ArgumentError, InputError, OutOfRange, WrongType
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts, Row, row_key, rows_of
from hooklens.model.ids import show_text
from hooklens.model.transformer import HookedTransformer
from hooklens.results.result import Result, Table
from hooklens.results.statistics import halves

_MOST_CLASSES = 20
PerPrompt = Sequence[Any] | Tensor | np.ndarray  # one value per prompt


@dataclass(frozen=True, eq=False)
class ProbeTask(Result):
    """Examples: prompt `prompt[i]` read at position `pos[i]` has the class `label[i]`.

    `entities` are the things whose identity could reveal an example's label (a noun, an operand). Examples that share a
    prompt or an entity, directly or through others, form one group. Folds never split a group, and intervals resample
    whole groups.
    """

    name: str
    tokens: list[Row]
    prompt: Int[Tensor, "example"]
    pos: Int[Tensor, "example"]
    label: Int[Tensor, "example"]
    classes: list[str]
    entities: list[list[str]]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.label)

    @property
    def group(self) -> Int[Tensor, "example"]:
        """The group of each example: examples linked by a prompt or an entity."""
        return components([[row, *names] for row, names in zip(self.token_rows(), self.entities, strict=True)])

    def text_numbers(self) -> Int[Tensor, "example"]:
        """The prompt number of each example; prompts with the same tokens have the same number."""
        return components([[row] for row in self.token_rows()])

    def token_rows(self) -> list[tuple[int | float, ...]]:
        """The token ids of each example's prompt, or the numbers of its vectors."""
        rows = [row_key(row) for row in self.tokens]
        return [rows[i] for i in self.prompt.tolist()]

    def take(self, index: Any) -> "ProbeTask":
        """Select some of the examples, with their prompts; `index` has numbers or one boolean per example."""
        try:
            chosen = torch.arange(len(self))[index].reshape(-1)
        except (IndexError, TypeError) as error:
            raise OutOfRange(f"examples are numbered from 0 to {len(self) - 1}, got {index!r:.60}") from error
        kept, prompt = self.prompt[chosen].unique(return_inverse=True)
        return replace(
            self,
            tokens=[self.tokens[i] for i in kept.tolist()],
            prompt=prompt,
            pos=self.pos[chosen],
            label=self.label[chosen],
            entities=[self.entities[i] for i in chosen.tolist()],
            texts=[self.texts[i] for i in kept.tolist()],
        )

    def halves(self, *, seed: int = 0) -> tuple["ProbeTask", "ProbeTask"]:
        """Split into two halves that share no group: one for training, one for testing a claim."""
        first, second = halves(len(self), group=self.group, seed=seed)
        return self.take(first), self.take(second)

    def table(self, n: int | None = 8) -> Table:
        """One row per example."""
        texts = [self.texts[i] for i in self.prompt.tolist()]
        names = [self.classes[i] for i in self.label.tolist()]
        rows = list(zip(texts, self.pos.tolist(), names, self.group.tolist(), strict=True))
        return Table(("prompt", "position", "label", "group"), rows).head(n)

    def figure(self) -> Any:
        """The number of examples of each class, and of groups that folds keep together."""
        from hooklens.viz.figures import bars

        group, n_classes = self.group, len(self.classes)
        groups = [len(group[self.label == i].unique()) for i in range(n_classes)]
        names = [f"{name}: {n} groups" for name, n in zip(self.classes, groups, strict=True)]
        counts = self.label.bincount(minlength=n_classes).double()
        return bars(counts, labels=names, title=f"{self.name}: {len(self)} examples", y_title="examples")


def read_task(
    model: HookedTransformer,
    prompts: Prompts | PromptPairs,
    labels: PerPrompt | None = None,
    *,
    group: PerPrompt | None = None,
    pos: int | PerPrompt = -1,
    name: str = "given labels",
) -> ProbeTask:
    """Make a task from your own prompts: one label per prompt, read at one position (negative: from its end).

    >>> from hooklens.testing import tiny_model
    >>> task = read_task(tiny_model(), [[1, 2], [3, 4], [1, 5]], ["odd", "even", "odd"], group=["a", "b", "a"])
    >>> task.classes, task.label.tolist(), task.pos.tolist(), task.group.tolist()
    (['even', 'odd'], [1, 0, 1], [1, 1, 1], [0, 1, 0])

    `PromptPairs` have no `labels`: the classes are "corrupted" and "clean", and the two prompts of a pair, or all of a
    group of pairs, form a group.
    """
    if isinstance(prompts, PromptPairs):
        rows, label, group = _both_sides(model, prompts, labels, group)
        classes = ["corrupted", "clean"]
    else:
        rows = rows_of(model, prompts, "prompts")
        label, classes = _classes(one_per_prompt("labels", labels, len(rows)))
        group = None if group is None else one_per_prompt("group", group, len(rows))
    return ProbeTask(
        name=name,
        tokens=[row.cpu() for row in rows],
        prompt=torch.arange(len(rows)),
        pos=torch.tensor(positions_of(rows, pos)),
        label=torch.tensor(label),
        classes=classes,
        entities=[[] for _ in rows] if group is None else [[str(key)] for key in group],
        texts=[show_text(model, row) for row in rows],
    )


def checked_task(task: Any) -> ProbeTask:
    """The task; anything else raises."""
    if not isinstance(task, ProbeTask):
        call = "read_task(model, pairs)" if isinstance(task, PromptPairs) else "read_task(model, prompts, labels)"
        raise WrongType(f"task is a ProbeTask, such as {call} returns; got {type(task).__name__}")
    return task


def positions_of(rows: Sequence[Tensor], pos: int | PerPrompt) -> list[int]:
    """The position read in each prompt, counted from its start; `pos` is one for all or one per prompt.

    >>> positions_of([torch.zeros(3), torch.zeros(2)], -1)
    [2, 1]
    """
    places = [pos] * len(rows) if isinstance(pos, int) else one_per_prompt("pos", pos, len(rows))
    for i, (place, row) in enumerate(zip(places, rows, strict=True)):
        if type(place) is not int:  # True is no position
            raise WrongType(f"pos is a whole number, or one per prompt; got {place!r:.60}")
        if not -len(row) <= place < len(row):
            raise InputError(f"position {place} is out of range for prompt {i}, which has {len(row)} tokens")
    return [place % len(row) for place, row in zip(places, rows, strict=True)]


def components(keys: Sequence[Iterable[Hashable]]) -> Int[Tensor, "example"]:
    """Connected components: examples that share a key, directly or through other examples.

    >>> components([["a", "b"], ["c"], ["b", "d"], ["d"]]).tolist()
    [0, 1, 0, 0]
    """
    parent: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for i, names in enumerate(keys):
        for name in names:
            parent[root(("key", name))] = root(("example", i))
    number: dict[Hashable, int] = {}
    return torch.tensor([number.setdefault(root(("example", i)), len(number)) for i in range(len(keys))])


def _both_sides(
    model: HookedTransformer, pairs: PromptPairs, labels: Any, group: Any
) -> tuple[list[Tensor], list[int], list]:
    """The clean and the corrupted prompts of pairs, their labels 1 and 0, and their groups."""
    if labels is not None or pairs.corrupted is None:
        raise ArgumentError("PromptPairs need {corrupted} prompts and no {labels}: the classes are clean and corrupted")
    n, of_pair = len(pairs), pairs.group if group is None else group
    of_pair = one_per_prompt("group", list(range(n)) if of_pair is None else of_pair, n)
    rows = [*rows_of(model, pairs.clean, "clean"), *rows_of(model, pairs.corrupted, "corrupted")]
    return rows, [1] * n + [0] * n, of_pair * 2


def one_per_prompt(name: str, values: Any, n: int) -> list:
    """The values as a list of plain numbers or texts, one per prompt."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise WrongType(f"{name} is a sequence with one entry per prompt, got {values!r:.60}")
    if len(listed) != n:
        raise InputError(f"{name} has one entry per prompt, got {len(listed)} for {n} prompts")
    return [value.item() if hasattr(value, "item") else value for value in listed]


def _classes(labels: list) -> tuple[list[int], list[str]]:
    """The class number of each label, and the names of the classes in order."""
    for label in labels:
        if not isinstance(label, str | Real) or label != label:
            raise WrongType(f"labels are texts, numbers or booleans, got {label!r:.60}")
    kinds = sorted(set(labels), key=lambda label: (isinstance(label, str), label))
    if len(kinds) < 2:
        raise InputError(f"a probe needs at least two classes, got {len(labels)} labels that are all {kinds[:1]}")
    if len(kinds) > _MOST_CLASSES:
        raise InputError(
            f"labels are classes, at most {_MOST_CLASSES} of them; got {len(kinds)} different values in {len(labels)} "
            "labels; bin the values first, or regress them with train_value_probe"
        )
    rank = {kind: i for i, kind in enumerate(kinds)}
    return [rank[label] for label in labels], [str(kind) for kind in kinds]
