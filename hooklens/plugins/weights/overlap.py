"""Composition of weights: every writer against every later reader, compared with random bases of the same spectrum."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.component import Component, layer_name
from hooklens.core.progress_bar import progress
from hooklens.model.block import Block
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.weights.components import Part, random_block, readers, stream_width, writers
from hooklens.plugins.weights.needs import Needs, lacking
from hooklens.results.result import Result, Table
from hooklens.results.statistics import q_values

Pairs = Float[Tensor, "writer reader"]

_DRAWS = 200  # random pairs of bases for every pair of parts: each takes a QR decomposition


@dataclass(frozen=True, eq=False)
class Overlap(Result):
    """Every writer against every reader that it can reach; NaN for other pairs.

    `composition` is |W R| / (|W| |R|) in Frobenius norms, for a writer's matrix W and a reader's R. `null_mean` and
    `null_sd` are those of matrices with the same singular values and random bases; `p` is the share of draws that reach
    the composition. `shared` is the mean squared cosine of the principal angles between the two subspaces, regardless
    of how strongly their directions are used; for random subspaces its mean is the larger one's share of the stream.
    """

    ranked_by = "distance above the null"

    terms = {
        "random": "the mean composition of matrices with the same singular values and random bases",
        "times random": "the composition divided by that",
    }

    writers: list[str]
    readers: list[str]
    composition: Pairs
    shared: Pairs
    null_mean: Pairs
    null_sd: Pairs
    p: Pairs
    draws: int

    @property
    def q(self) -> Pairs:
        """False discovery rates over all pairs."""
        return q_values(self.p)

    @property
    def z(self) -> Pairs:
        """How many standard deviations of the null each composition lies above its mean."""
        return (self.composition - self.null_mean) / self.null_sd

    def order(self) -> list[tuple[int, int]]:
        """Every pair, the largest ratio to its null first."""
        excess = self._excess().flatten()
        order = excess.nan_to_num(-torch.inf).argsort(descending=True, stable=True)[: int((~excess.isnan()).sum())]
        return [divmod(i, len(self.readers)) for i in order.tolist()]

    def table(self, n: int | None = 12) -> Table:
        """One row per pair."""
        columns = ("writer", "reader", "composition", "random", "times random", "z", "p", "q", "shared subspace")
        numbers = (self.composition, self.null_mean, self._excess(), self.z, self.p, self.q, self.shared)
        named = [(self.writers[i], self.readers[j], i, j) for i, j in self.order()[:n]]
        return Table(columns, [(w, r, *(float(values[i, j]) for values in numbers)) for w, r, i, j in named])

    def _excess(self) -> Pairs:
        return self.composition / self.null_mean

    def figure(self) -> Any:
        """For every pair of layers: the largest composition as a multiple of that of random bases."""
        from hooklens.viz.figures import heatmap

        excess = self._excess().nan_to_num(nan=-torch.inf)
        rows, columns = (_by_layer(names) for names in (self.writers, self.readers))
        grid = torch.full((len(rows), len(columns)), torch.nan)
        hover = [[""] * len(columns) for _ in rows]
        for y, i in enumerate(rows.values()):
            for x, j in enumerate(columns.values()):
                best, at = excess[i][:, j].flatten().max(0)
                if bool(best.isfinite()):
                    writer, reader = divmod(int(at), len(j))
                    grid[y, x], hover[y][x] = best, f"{self.writers[i[writer]]} to {self.readers[j[reader]]}"
        return heatmap(
            grid,
            x=list(columns),
            y=list(rows),
            title="Which layer writes where another reads? Strongest pair, times random bases of the same spectrum",
            x_title="reader in layer",
            y_title="writer in layer",
            hover=hover,
            diverging=False,
            colourbar="times random",
        )


def measure_overlap(model: HookedTransformer, *, mlps: bool = True, draws: int = _DRAWS, seed: int = 0) -> Overlap:
    """Which components write into directions that later ones read, more than their spectra alone would have it?

    Writers are heads (W_V W_O) and MLPs (W_out). Readers are heads' q, k and v and MLPs (W_in next to W_gate), with the
    norm's weight folded in. In the null both keep their singular values and get random bases (Haar), so a matrix with
    one large singular value has no advantage. The mean square of the null is 1 / d_model.

    >>> from hooklens.testing import tiny_model
    >>> found = measure_overlap(tiny_model(n_layers=2, attn_only=True), draws=50)
    >>> found.writers, found.readers[:3]
    (['L0H0', 'L0H1', 'L1H0', 'L1H1'], ['L0H0.q', 'L0H1.q', 'L0H0.k'])
    >>> bool(found.composition[2:].isnan().all())      # nothing reads what the last layer's heads write
    True

    Reference: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", composition scores.
    """
    whole("draws", draws, 2)  # a deviation needs two
    sources, targets = list(writers(model, mlps)), list(readers(model, mlps))
    shape, dtype = (len(sources), len(targets)), sources[0].basis.dtype
    composition, shared = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    kinds = _kinds(sources)
    with progress("overlap", len(kinds) * len(targets), unit="reader") as advance:
        for rows in kinds:
            basis, weight = (_padded([getattr(sources[i], name) for i in rows]) for name in ("basis", "weight"))
            ranks = torch.tensor([len(sources[i].basis) for i in rows])
            for j, reader in enumerate(targets):
                n = sum(_reaches(model.blocks[0], sources[i], reader) for i in rows)  # they are sorted by layer
                if n:
                    square = (basis[:n] @ reader.basis.mT).square()
                    composition[rows[:n], j] = torch.einsum("nk,nkl,l->n", weight[:n], square, reader.weight).sqrt()
                    shared[rows[:n], j] = square.sum((1, 2)) / ranks[:n].clamp_max(len(reader.basis))
                advance()
    mean, sd, p = _null(model, sources, targets, composition, draws=draws, generator=seeded(seed))
    return Overlap(
        writers=[part.name for part in sources],
        readers=[part.name for part in targets],
        composition=composition,
        shared=shared,
        null_mean=mean,
        null_sd=sd,
        p=p,
        draws=draws,
    )


def _kinds(parts: list[Part]) -> list[list[int]]:
    """The indices of heads and of MLPs; parts that are 0 are left out."""
    kinds = [[i for i, part in enumerate(parts) if part.mlp == mlp and len(part.basis)] for mlp in (False, True)]
    return [kind for kind in kinds if kind]


def _reaches(block: Block, writer: Part, reader: Part) -> bool:
    """Does the writer come before the reader, and is neither of them 0?"""
    before = writer.layer < reader.layer
    after = block.mlp_reads_attn if reader.mlp else block.attn_reads_mlp
    within = writer.layer == reader.layer and reader.mlp != writer.mlp and after
    return (before or within) and min(len(writer.basis), len(reader.basis)) > 0


def _null(
    model: HookedTransformer,
    sources: list[Part],
    targets: list[Part],
    seen: Pairs,
    *,
    draws: int,
    generator: torch.Generator,
) -> tuple[Pairs, Pairs, Pairs]:
    """Mean and deviation of the composition under random bases, and how often it is reached.

    Only the relative position of the two bases matters, so one block of a random orthogonal matrix serves every pair of
    the same kinds in a draw.
    """
    mean, sd, p = torch.full_like(seen, torch.nan), torch.full_like(seen, torch.nan), seen.double() * torch.nan
    for rows, columns in product(_kinds(sources), _kinds(targets)):
        at = torch.tensor(rows)[:, None], torch.tensor(columns)
        w, r = _padded([sources[i].weight for i in rows]), _padded([targets[j].weight for j in columns])
        total, squares, reached = (torch.zeros(len(rows), len(columns), dtype=torch.float64) for _ in range(3))
        for _ in range(draws):
            block = random_block(w.shape[1], r.shape[1], stream_width(model), generator, w)
            drawn = (w @ block.square() @ r.mT).sqrt().double()
            total, squares, reached = total + drawn, squares + drawn.square(), reached + (drawn >= seen[at])
        mean[at] = (total / draws).to(seen)
        sd[at] = ((squares - total.square() / draws) / (draws - 1)).clamp_min(0).sqrt().to(seen)
        p[at] = (reached + 1) / (draws + 1)
    unseen = seen.isnan()
    return mean.masked_fill(unseen, torch.nan), sd.masked_fill(unseen, torch.nan), p.masked_fill(unseen, torch.nan)


def _padded(parts: list[Tensor]) -> Float[Tensor, "part rank *d_model"]:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def _by_layer(names: list[str]) -> dict[str, list[int]]:
    """Indices of the names of each layer."""
    layers: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        layers.setdefault(layer_name(Component.parse(name).layer), []).append(i)
    return layers


def demo(model: HookedTransformer) -> Overlap | Needs:
    """Every pair of the model, with 40 draws; one layer without an MLP has no pairs."""
    return lacking(model, tokens=False) or measure_overlap(model, draws=40)
