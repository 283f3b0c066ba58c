"""What the grids of patching results share: shapes, labels, names of cells, order and pictures."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.component import Component, no_component
from hooklens.data.prompts import Pairs
from hooklens.model.ids import show
from hooklens.sweeps.nodes import read_components
from hooklens.sweeps.planning import Patch, sizes_of

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

Labels = dict[str, list[str]]

_ROW = 15  # pixels
_AXIS = {"pos": "token (clean | corrupted where they differ)"}
STRONGEST = 24  # rows of a grid of three axes: all 270 heads of a small model would be hairlines
_PREFIX = {"layer": "L", "head": "H", "neuron": "N"}


def shape_of(model: "HookedTransformer", site: str, by: Sequence[str], n_pos: int) -> tuple[int, ...]:
    """How many cells the grid has along each axis."""
    sizes = sizes_of(model, site, n_pos)
    return tuple(sizes[axis] for axis in by)


def labels_of(model: "HookedTransformer", by: Sequence[str], shape: Sequence[int], group: Pairs) -> Labels:
    """What the cells along each axis are called: L0, L1, ...; positions by the first pair's tokens."""
    labels = {
        axis: [f"{_PREFIX[axis]}{i}" for i in range(n)] for axis, n in zip(by, shape, strict=True) if axis != "pos"
    }
    if "pos" in by:
        pairs = zip(show(model, group.clean[0]), show(model, group.corrupted[0]), strict=True)
        labels["pos"] = [a if a == b else f"{a} |{b}" for a, b in pairs]
    return labels


def read_patches(model: "HookedTransformer", asked: Sequence[Any]) -> list[Patch]:
    """Patches from what a user writes: Patch(5, head=1), "L5H1", (5, 1), ("z", 5) for every head, "L2N17", "L5@-1".

    >>> from hooklens.testing import tiny_model
    >>> read_patches(tiny_model(), ["L1H0", "L0@-1"]) == [Patch(1, head=0), Patch(0, pos=-1)]
    True
    """
    found = []
    for one in asked:
        if isinstance(one, Patch):
            found.append(one)
            continue
        for node in read_components(model, one, "patch"):
            if node.kind not in ("head", "neuron", "layer") or isinstance(node.pos, tuple):
                raise no_component(one, "patch")
            found.append(Patch(node.layer, node.pos, node.head, node.neuron))
    return found


def patch_name(patch: Patch) -> str:
    """What a single patch is called.

    >>> patch_name(Patch(5, head=1)), patch_name(Patch(2, pos=3))
    ('L5H1', 'L2 (3)')
    """
    kind = "neuron" if patch.neuron is not None else "layer" if patch.head is None else "head"
    name = Component(kind, patch.layer, patch.head, patch.neuron).name
    return name if patch.pos is None else f"{name} ({patch.pos})"


def cell_name(by: Sequence[str], labels: Mapping[str, Sequence[str]], index: Sequence[int]) -> str:
    """What a grid index is called: L5H1, L3 ' Mary' (4), L2N17."""
    parts = dict(zip(by, index, strict=True))
    if "patch" in parts:
        return labels["patch"][index[0]] if "patch" in labels else f"patch {index[0]}"
    told = {axis: labels.get(axis) for axis in _PREFIX if axis in parts}
    name = "".join(f"{_PREFIX[axis]}{parts[axis]}" if of is None else of[parts[axis]] for axis, of in told.items())
    return name + (f" {labels['pos'][parts['pos']]!r} ({parts['pos']})" if "pos" in parts else "")


def cell_names(by: Sequence[str], labels: Labels, shape: Sequence[int]) -> list[str]:
    """The name of every cell, in the order of the flattened grid.

    >>> cell_names(("layer", "head"), {}, (1, 2))
    ['L0H0', 'L0H1']
    """
    return [cell_name(by, labels, index) for index in product(*map(range, shape))]


def largest_first(values: Float[Tensor, "*grid"]) -> list[tuple[int, ...]]:
    """Every grid index, the largest value first, whatever its sign; NaN last.

    >>> largest_first(torch.tensor([[1.0, -3.0]]))
    [(0, 1), (0, 0)]
    """
    flat = values.flatten().abs().nan_to_num(-1).argsort(descending=True, stable=True)
    return [tuple(int(i) for i in torch.unravel_index(index, values.shape)) for index in flat]


def in_order(groups: Sequence[Pairs], parts: Sequence[Shaped[Tensor, "..."]]) -> Shaped[Tensor, "..."]:
    """Rows of all groups in the order in which the pairs were given."""
    index = torch.tensor([i for group in groups for i in group.index])
    return torch.cat(list(parts))[index.argsort().to(parts[0].device)]


def draw_grid(
    values: Float[Tensor, "*grid"],
    by: Sequence[str],
    labels: Mapping[str, Sequence[str]],
    title: str,
    name: str,
    ends: tuple[Float[Tensor, "*grid"], Float[Tensor, "*grid"]] | None = None,
    rows: int | None = STRONGEST,
) -> Any:
    """Bars with their interval over one axis, a heat map over two; rows L0H0, L0H1, ... where there are three.

    Of the rows of three axes those `rows` with the largest values are drawn, in their order; None: all of them.
    """
    from hooklens.viz.figures import bars, heatmap

    names = [labels[axis] for axis in by]
    if values.ndim == 1:
        low, high = ends if ends is not None and bool(ends[0].isfinite().all()) else (None, None)
        return bars(values, low, high, names[0], title, x_title=by[0], y_title=name)
    called = names[0] if values.ndim == 2 else [f"{a}{b}" for a in names[0] for b in names[1]]
    values = values.reshape(len(called), -1)
    chosen = list(range(len(called)))
    rows = None if rows is None else whole("rows", rows, 1)
    if len(by) == 3 and rows is not None and len(called) > rows:
        largest = values.abs().nan_to_num(-1).amax(1).argsort(descending=True, stable=True)[:rows]
        chosen, title = sorted(largest.tolist()), f"{title}: the {rows} strongest of {len(called)} rows"
    drawn = heatmap(
        values[chosen],
        x=names[-1],
        y=[called[i] for i in chosen],
        title=title,
        x_title=_AXIS.get(by[-1], by[-1]),
        y_title=" x ".join(by[:-1]),
        colourbar=name,
    )
    tall = 130 + _ROW * len(chosen)
    if len(by) == 3 and tall > drawn.layout.height:  # every row with its name
        drawn.update_layout(height=tall).update_yaxes(tickvals=list(range(len(called))), ticktext=called)
    return drawn
