"""One value per head: the order of the heads, and a table with a row for each."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.component import head_names, layer_names
from hooklens.results.table import Table

PerHead = Float[Tensor, "layer head"]
PerSequence = Float[Tensor, "sequence layer head"]
Head = tuple[int, int]  # layer and head


def in_order(values: Float[Tensor, "*cell"]) -> list[int]:
    """Flat indices, the largest value first and NaN last.

    >>> in_order(torch.tensor([1.0, torch.nan, 3.0]))
    [2, 0, 1]
    """
    return values.flatten().nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()


def ranked(values: PerHead) -> list[Head]:
    """Every (layer, head), the largest value first."""
    return [divmod(i, values.shape[1]) for i in in_order(values)]


def head_table(
    ranking: Float[Tensor, "*head"],
    columns: Mapping[str, Tensor | Sequence],
    n: int | None,
    *,
    names: Sequence[str] | None = None,
    title: str = "head",
) -> Table:
    """The `n` heads that rank highest, with their value in each column; NaN is an empty cell.

    Columns are tensors of the shape of `ranking`, or flat sequences of words. `names` are those of chosen heads.

    >>> print(head_table(torch.tensor([[1.0, 2.0]]), {"score": torch.tensor([[0.5, torch.nan]])}, 2))
    head   score
    L0H1
    L0H0  0.5000
    """
    names = head_names(*ranking.shape) if names is None else names
    cells = [column.flatten().tolist() if isinstance(column, Tensor) else column for column in columns.values()]
    rows = [(names[i], *(known(column[i]) for column in cells)) for i in in_order(ranking)[:n]]
    return Table((title, *columns), rows)


def known(value: Any) -> Any:
    """The value of a table's cell: None, an empty cell, for NaN."""
    return None if value != value else value


def head_map(values: PerHead, title: str, colourbar: str) -> Any:
    """Layer by head as a heat map."""
    from hooklens.viz.figures import heatmap

    rows = layer_names(len(values))
    return heatmap(values, y=rows, title=title, x_title="head", y_title="layer", colourbar=colourbar)
