"""Inputs of figures: tensors of any dtype and device, and labels that must match them."""

from collections.abc import Sequence, Sized

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from hooklens.core.errors import InputError, WrongType
from hooklens.viz.text import label


def as_array(values: Shaped[Tensor, "..."], axes: str, what: str) -> np.ndarray:
    """Convert values to float64 and check that they have the named axes ("y x"); infinities become NaN, drawn as gaps.

    >>> as_array(torch.ones(2, 3), "y x", "heatmap").shape
    (2, 3)
    """
    try:
        array = torch.as_tensor(values).detach().to("cpu", torch.float64).numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(values).__name__
        raise WrongType(
            f"{what} draws a tensor of real numbers [{axes}], got a {kind} ({error}); convert it"
        ) from error
    if array.ndim != len(axes.split()):
        raise InputError(
            f"{what} draws values with the axes [{axes}], got shape {list(array.shape)}; select or average the rest"
        )
    return np.where(np.isfinite(array), array, np.nan)


def as_labels(labels: Sequence[object] | None, count: int, axis: str, what: str, longest: int = 60) -> list[str]:
    """One label per entry, escaped; the indices of the entries if none are given.

    >>> as_labels(None, 2, "x", "heatmap"), as_labels(["<b>", 5], 2, "x", "heatmap")
    (['0', '1'], ['&lt;b&gt;', '5'])
    """
    shown = [str(i) for i in range(count)] if labels is None else [label(text, longest) or "∅" for text in labels]
    if len(shown) != count:
        raise InputError(
            f"{what} needs one label for each entry along {axis}, got {len(shown)} labels for {count} entries; "
            "give as many, or None to number them"
        )
    return shown


def as_series(what: str, axis: str, **values: Shaped[Tensor, "..."]) -> list[np.ndarray]:
    """Convert values along one axis that belong together entry by entry; see `as_array` and `same_length`.

    >>> [len(array) for array in as_series("bars", "bar", values=torch.ones(2), low=torch.zeros(2))]
    [2, 2]
    """
    arrays = {name: as_array(value, axis, what) for name, value in values.items()}
    same_length(what, **arrays)
    return list(arrays.values())


def same_length(what: str, **counted: Sized) -> None:
    """Raise if inputs that belong together entry by entry differ in length.

    >>> same_length("bars", values=[1, 2], low=[0])
    Traceback (most recent call last):
    ...
    hooklens.core.errors.InputError: bars needs as many values as low, got 2 values, 1 low; give one entry for each
    """
    counts = {name: len(series) for name, series in counted.items()}
    if len(set(counts.values())) > 1:
        seen = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise InputError(f"{what} needs as many {' as '.join(counts)}, got {seen}; give one entry for each")


def ticks(labels: Sequence[str], most: int = 64) -> dict:
    """Axis settings that put each label at its position. Equal labels stay separate; of very many, every k-th is shown.

    >>> ticks(["the", "the"])
    {'tickmode': 'array', 'tickvals': [0, 1], 'ticktext': ['the', 'the']}
    """
    shown = range(0, len(labels), -(-len(labels) // most) or 1)
    return {"tickmode": "array", "tickvals": list(shown), "ticktext": [labels[i] for i in shown]}
