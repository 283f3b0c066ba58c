"""What results of a grid of patches share: labels, names of cells, order and figure."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.component import Component
from hooklens.core.errors import InputError
from hooklens.data.prompts import Pairs
from hooklens.model.ids import show
from hooklens.model.transformer import HookedTransformer
from hooklens.sweeps.nodes import listed, read_components
from hooklens.sweeps.planning import Patch, component_of, parts_of, sizes_of

Labels = dict[str, list[str]]

_ROW = 15  # pixels
_AXIS = {"pos": "token (clean | corrupted where they differ)"}
STRONGEST = 24  # rows of a grid of three axes: all 270 heads of a small model would be hairlines


class OnGrid:
    """What results of a grid share. They have an `effect` for every cell, and `labels` along the axes `by`."""

    by: tuple[str, ...]
    labels: Labels
    effect: Any  # a tensor [*grid]

    def order(self) -> list[tuple[int, ...]]:
        """Every grid index, the largest effect first, whatever its sign; NaN last."""
        flat = self.effect.flatten().abs().nan_to_num(-1).argsort(descending=True, stable=True)
        return [tuple(int(i) for i in torch.unravel_index(index, self.effect.shape)) for index in flat]

    def name_of(self, index: Sequence[int]) -> str:
        """The name of a grid index: L5H1, L3 ' Mary' (4), L2N17."""
        parts = dict(zip(self.by, index, strict=True))
        name = "".join(self.labels[axis][i] for axis, i in parts.items() if axis != "pos")
        if "pos" not in parts:
            return name
        at = parts["pos"]
        label = self.labels["pos"][at]
        return f"{name} {label}" if label == f"vector {at}" else f"{name} {label!r} ({at})"

    @property
    def names(self) -> list[str]:
        """The name of every cell, in the order of the flattened grid."""
        return [self.name_of(index) for index in product(*map(range, self.effect.shape))]

    def rows(self, parts: Sequence[Float[Tensor, "*grid"]], n: int | None) -> list[tuple]:
        """The first `n` rows of a table: the name of a cell and its value in each part."""
        return [(self.name_of(index), *(float(part[index]) for part in parts)) for index in self.order()[:n]]

    def draw(
        self, values: Float[Tensor, "*grid"], title: str, name: str, ends: Any = None, rows: int | None = STRONGEST
    ) -> Any:
        """Draw values of the grid: bars with their interval over one axis, a heat map over two or three.

        Of the rows L0H0, L0H1, ... of three axes the `rows` with the largest values are drawn; None: all of them.
        """
        from hooklens.viz.figures import bars, heatmap

        ticks = [self.labels[axis] for axis in self.by]
        if values.ndim == 1:
            low, high = ends if ends is not None and bool(ends[0].isfinite().all()) else (None, None)
            return bars(values, low, high, ticks[0], title, x_title=self.by[0], y_title=name)
        called = ticks[0] if values.ndim == 2 else [f"{a}{b}" for a in ticks[0] for b in ticks[1]]
        values = values.reshape(len(called), -1)
        chosen = list(range(len(called)))
        rows = None if rows is None else whole("rows", rows, 1)
        if len(self.by) == 3 and rows is not None and len(called) > rows:
            largest = values.abs().nan_to_num(-1).amax(1).argsort(descending=True, stable=True)[:rows]
            chosen, title = sorted(largest.tolist()), f"{title}: the {rows} strongest of {len(called)} rows"
        drawn = heatmap(
            values[chosen],
            x=ticks[-1],
            y=[called[i] for i in chosen],
            title=title,
            x_title=_AXIS.get(self.by[-1], self.by[-1]),
            y_title=" x ".join(self.by[:-1]),
            colourbar=name,
        )
        tall = 130 + _ROW * len(chosen)
        if len(self.by) == 3 and tall > drawn.layout.height:  # every row with its name
            drawn.update_layout(height=tall).update_yaxes(tickvals=list(range(len(called))), ticktext=called)
        return drawn


def labels_of(model: HookedTransformer, site: str, by: Sequence[str], group: Pairs) -> Labels:
    """The names of the cells along each axis: L0, L1, ...; positions by the tokens of the first pair."""
    sizes, labels = sizes_of(model, site, group.clean.shape[1]), {}
    for axis in by:
        if axis == "pos":
            pairs = zip(show(model, group.clean[0]), show(model, group.corrupted[0]), strict=True)
            labels[axis] = [a if a == b else f"{a} |{b}" for a, b in pairs]
        else:
            cells = [Patch(**{"layer": 0, axis: i}) for i in range(sizes[axis])]
            names = [component_of(model, site, cell).name for cell in cells]
            labels[axis] = names if axis == "layer" else [name.removeprefix("L0") for name in names]
    return labels


def read_patches(model: HookedTransformer, site: str, asked: Any) -> list[Patch]:
    """Patches from what a user writes: Patch(5, head=1), "L5H1", (5, 1), ("z", 5) for every head, "L2N17", "L5@-1".

    At k and v a head stands for the key/value head that it reads.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model(n_heads=4, n_key_value_heads=2)
    >>> read_patches(model, "z", ["L1H0", "L0@-1"]) == [Patch(1, head=0), Patch(0, pos=-1)]
    True
    >>> read_patches(model, "k", ["L1G1.k"]) == read_patches(model, "k", ["L1H3.k"]) == [Patch(1, head=1)]
    True
    """
    patches = []
    for item in [asked] if isinstance(asked, Patch) else listed(asked, "patches"):
        if isinstance(item, Patch):
            patches.append(item)
            continue
        nodes = read_components(model, item, f"patch of {site}")
        patches += [_patch_of(model, site, node, item) for node in nodes]
    return list(dict.fromkeys(patches))  # heads that share keys are one patch


def _patch_of(model: HookedTransformer, site: str, node: Component, asked: Any) -> Patch:
    """The patch that overwrites this component at this site."""
    cells = {"layers": Patch(0)} | {f"{part}s": Patch(0, **{part: 0}) for part in parts_of(site) & {"head", "neuron"}}
    there = {words: component_of(model, site, cell) for words, cell in cells.items()}
    kinds = {"layer", *(example.kind for example in there.values())} | ({"head"} if "heads" in there else set())
    if node.kind not in kinds:
        named = asked if isinstance(asked, str) else node  # a head of shared keys is parsed as the key head
        has = ", ".join(f'{words} such as "{example}"' for words, example in there.items())
        raise InputError(
            f'{named} was asked for as a patch of {site}, which has {has}; "L0@-1" is one position of a layer'
        )
    if isinstance(node.pos, tuple):
        raise InputError(f"a patch has one position for all prompts, got {node.pos}; ablate them one by one")
    head = node.head
    if node.kind == "head" and head is not None:  # at k and v: the key/value head that it reads
        head = head * sizes_of(model, site, 0)["head"] // model.cfg.n_heads
    return Patch(node.layer, node.pos, head, node.neuron)


def draw_agreement(
    x: Float[Tensor, "cell"], y: Float[Tensor, "cell"], names: Sequence[str], title: str, axes: tuple[str, str]
) -> Any:
    """Cells by two values each; on the dotted diagonal the two agree."""
    from hooklens.viz.curves import scatter

    drawn = scatter(x, y, names, title, x_title=axes[0], y_title=axes[1])
    low, high = (float(end) for end in x.aminmax())
    return drawn.add_shape(type="line", x0=low, x1=high, y0=low, y1=high, line={"dash": "dot", "width": 1})


def in_order(groups: Sequence[Pairs], parts: Sequence[Shaped[Tensor, "..."]]) -> Shaped[Tensor, "..."]:
    """Rows of all groups in the order in which the pairs were given."""
    index = torch.tensor([i for group in groups for i in group.index])
    return torch.cat(list(parts))[index.argsort().to(parts[0].device)]
