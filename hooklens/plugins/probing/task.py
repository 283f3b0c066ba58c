"""The data of a probe: prompts, the positions that are read, a label for each, and groups of related examples."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.errors import InputError
from hooklens.data.prompts import Prompts, rows_of
from hooklens.model.ids import show
from hooklens.results.result import Result
from hooklens.results.statistics import halves
from hooklens.results.table import Table

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_MOST_CLASSES = 20
Label = str | int | float | bool


@dataclass(frozen=True, eq=False)
class ProbeTask(Result):
    """Examples: prompt `prompt[i]` read at position `pos[i]` has the class `label[i]`.

    `entities` are the things whose identity could reveal an example's label (a noun, an operand). Examples that share a
    prompt or an entity, directly or through others, form one group. Folds never split a group, and intervals resample
    whole groups.
    """

    name: str
    tokens: list[Int[Tensor, "_"]]
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
        rows = [tuple(row.tolist()) for row in self.tokens]
        return components([[rows[i], *names] for i, names in zip(self.prompt.tolist(), self.entities, strict=True)])

    def text_numbers(self) -> Int[Tensor, "example"]:
        """The prompt number of each example; prompts with the same tokens have the same number."""
        rows = [tuple(row.tolist()) for row in self.tokens]
        return components([[rows[i]] for i in self.prompt.tolist()])

    def take(self, index: Int[Tensor, "chosen"]) -> "ProbeTask":
        """Select some of the examples, with their prompts."""
        kept, prompt = self.prompt[index].unique(return_inverse=True)
        return ProbeTask(
            name=self.name,
            tokens=[self.tokens[i] for i in kept.tolist()],
            prompt=prompt,
            pos=self.pos[index],
            label=self.label[index],
            classes=self.classes,
            entities=[self.entities[i] for i in index.tolist()],
            texts=[self.texts[i] for i in kept.tolist()],
        )

    def halves(self, *, seed: int = 0) -> tuple["ProbeTask", "ProbeTask"]:
        """Split into two halves that share no group: one for training, one for testing a claim."""
        first, second = halves(len(self), group=self.group, seed=seed)
        return self.take(first), self.take(second)

    def table(self, n: int | None = 8) -> Table:
        """One row per example."""
        count = len(self) if n is None else min(whole("n", n), len(self))
        group = self.group.tolist()
        rows = [
            (self.texts[int(self.prompt[i])], int(self.pos[i]), self.classes[int(self.label[i])], group[i])
            for i in range(count)
        ]
        return Table(("prompt", "position", "label", "group"), rows)

    def figure(self) -> Any:
        """The number of examples of each class, and of groups that folds keep together."""
        from hooklens.viz.figures import bars

        kept = [self.label == one for one in range(len(self.classes))]
        groups = [len(self.group[one].unique()) for one in kept]
        names = [f"{name}: {n} groups" for name, n in zip(self.classes, groups, strict=True)]
        counts = torch.tensor([float(one.sum()) for one in kept])
        return bars(counts, labels=names, title=f"{self.name}: {len(self)} examples", y_title="examples")


def read_task(
    model: "HookedTransformer",
    prompts: Prompts,
    labels: Sequence[Label],
    *,
    group: Sequence[Hashable] | None = None,
    pos: int | Sequence[int] = -1,
    name: str = "given labels",
) -> ProbeTask:
    """Make a task from your own prompts: one label per prompt, read at one position (negative: from its end).

    >>> from hooklens.testing import tiny_model
    >>> task = read_task(tiny_model(), [[1, 2], [3, 4], [1, 5]], ["odd", "even", "odd"], group=["a", "b", "a"])
    >>> task.classes, task.label.tolist(), task.pos.tolist(), task.group.tolist()
    (['even', 'odd'], [1, 0, 1], [1, 1, 1], [0, 1, 0])
    """
    rows = [row.cpu() for row in rows_of(model, prompts, "prompts")]
    n = len(rows)
    places = [pos] * n if isinstance(pos, int) else list(pos)
    for what, given in (("labels", labels), ("group", group or rows), ("pos", places)):
        if len(given) != n:
            raise InputError(f"{what} has one entry per prompt, got {len(given)} for {n} prompts")
    label, classes = _classes(labels)
    at = [_place(place, len(row), i) for i, (place, row) in enumerate(zip(places, rows, strict=True))]
    entities = [[] if group is None else [str(one)] for one in (group or rows)]
    texts = ["".join(show(model, row)) if model.tokenizer else " ".join(show(model, row)) for row in rows]
    return ProbeTask(
        name=name,
        tokens=rows,
        prompt=torch.arange(n),
        pos=torch.tensor(at),
        label=label,
        classes=classes,
        entities=entities,
        texts=texts,
    )


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


def _classes(labels: Sequence[Label]) -> tuple[Int[Tensor, "example"], list[str]]:
    kinds = sorted(set(labels), key=lambda one: (isinstance(one, str), one))  # type: ignore[arg-type]
    if len(kinds) < 2:
        raise InputError(f"a probe needs at least two classes, got {len(labels)} labels that are all {kinds[:1]}")
    if len(kinds) > _MOST_CLASSES:
        raise InputError(
            f"labels are classes, at most {_MOST_CLASSES} of them; got {len(kinds)} different values in {len(labels)} "
            "labels; bin the values first"
        )
    rank: dict[Any, int] = {kind: i for i, kind in enumerate(kinds)}
    return torch.tensor([rank[one] for one in labels]), [str(kind) for kind in kinds]


def _place(pos: int, length: int, index: int) -> int:
    if not -length <= pos < length:
        raise InputError(f"position {pos} is out of range for prompt {index}, which has {length} tokens")
    return pos % length


def most_common(label: Int[Tensor, "example"]) -> int:
    """The most common class; the first one if several tie.

    >>> most_common(torch.tensor([1, 2, 2]))
    2
    """
    counts = Counter(label.tolist())
    return min(counts, key=lambda one: (-counts[one], one))
