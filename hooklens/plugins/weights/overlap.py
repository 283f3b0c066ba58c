"""Composition of weights: every writer against every later reader, compared with random bases of the same spectrum."""

import re
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import InputError
from hooklens.core.progress_bar import progress
from hooklens.plugins.weights.components import Part, random_block, readers, stream_width, writers
from hooklens.plugins.weights.needs import Needs, lacking
from hooklens.results.result import Result, Table
from hooklens.results.statistics import q_values

if TYPE_CHECKING:
    from hooklens.model.block import Block
    from hooklens.model.transformer import HookedTransformer

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
        excess = torch.nan_to_num(self.composition / self.null_mean, nan=-1.0).flatten()
        by = excess.argsort(descending=True, stable=True)[: int((~self.composition.isnan()).sum())]
        return [divmod(i, len(self.readers)) for i in by.tolist()]

    def table(self, n: int | None = 12) -> Table:
        """One row per pair."""
        columns = ("writer", "reader", "composition", "random", "times random", "z", "p", "q", "shared subspace")
        q, z, rows = self.q, self.z, []
        for i, j in self.order()[:n]:
            seen, chance = float(self.composition[i, j]), float(self.null_mean[i, j])
            rest = (float(one[i, j]) for one in (z, self.p, q, self.shared))
            rows.append((self.writers[i], self.readers[j], seen, chance, seen / chance, *rest))
        return Table(columns, rows)

    def figure(self) -> Any:
        """For every pair of layers: the largest composition as a multiple of that of random bases."""
        from hooklens.viz.figures import heatmap

        excess = torch.nan_to_num(self.composition / self.null_mean, nan=-1.0)
        rows, columns = (_by_layer(names) for names in (self.writers, self.readers))
        best = [[excess[i][:, j].flatten().max(0) for j in columns.values()] for i in rows.values()]
        grid = torch.tensor([[float(one.values) for one in line] for line in best])
        grid = torch.where(grid < 0, torch.nan, grid)
        shown = [
            [self._named(i, j, int(one.indices)) for one, j in zip(line, columns.values(), strict=True)]
            for line, i in zip(best, rows.values(), strict=True)
        ]
        title = "Which layer writes where another reads? Strongest pair, times random bases of the same spectrum"
        axes: dict[str, Any] = {
            "y": list(rows),
            "x": list(columns),
            "y_title": "writer in layer",
            "x_title": "reader in layer",
        }
        return heatmap(grid, **axes, title=title, hover=shown, diverging=False, colourbar="times random")

    def _named(self, rows: list[int], columns: list[int], place: int) -> str:
        i, j = divmod(place, len(columns))
        return f"{self.writers[rows[i]]} to {self.readers[columns[j]]}"


def measure_overlap(model: "HookedTransformer", *, mlps: bool = True, draws: int = _DRAWS, seed: int = 0) -> Overlap:
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
    if draws < 2:
        raise InputError(f"draws is the number of random pairs of bases; a deviation needs at least 2, got {draws}")
    sources, targets = list(writers(model, mlps)), list(readers(model, mlps))
    seen, shared = (torch.full((len(sources), len(targets)), torch.nan, dtype=sources[0].basis.dtype) for _ in "ab")
    with progress("overlap", 2 * len(targets), unit="reader") as advance:
        for mlp in (False, True):
            rows = [i for i, one in enumerate(sources) if one.mlp == mlp and len(one.basis)]
            chosen = [sources[i] for i in rows]
            if not chosen:
                continue
            basis, weight = _padded([one.basis for one in chosen]), _padded([one.weight for one in chosen])
            ranks = torch.tensor([len(one.basis) for one in chosen])
            for j, reader in enumerate(targets):
                n = sum(_reaches(model.blocks[0], one, reader) for one in chosen)  # they are sorted by layer
                if n:
                    square = (basis[:n] @ reader.basis.mT).square()
                    seen[rows[:n], j] = torch.einsum("nk,nkl,l->n", weight[:n], square, reader.weight).sqrt()
                    shared[rows[:n], j] = square.sum((1, 2)) / ranks[:n].clamp_max(len(reader.basis))
                advance()
    names = [one.name for one in sources], [one.name for one in targets]
    return Overlap(
        *names, seen, shared, *_null(model, sources, targets=targets, seen=seen, draws=draws, seed=seed), draws
    )


def _reaches(block: "Block", writer: Part, reader: Part) -> bool:
    """Does the writer come before the reader, and is neither of them 0?"""
    before = writer.layer < reader.layer
    after = block.mlp_reads_attn if reader.mlp else block.attn_reads_mlp
    within = writer.layer == reader.layer and reader.mlp != writer.mlp and after
    return (before or within) and min(len(writer.basis), len(reader.basis)) > 0


def _null(
    model: "HookedTransformer", sources: list[Part], targets: list[Part], seen: Pairs, draws: int, seed: int
) -> tuple[Pairs, Pairs, Pairs]:
    """Mean and deviation of the composition under random bases, and how often it is reached.

    Only the relative position of the two bases matters, so one block of a random orthogonal matrix serves every pair of
    the same kinds in a draw.
    """
    mean, sd = torch.full_like(seen, torch.nan), torch.full_like(seen, torch.nan)
    p = torch.full_like(seen, torch.nan, dtype=torch.float64)
    generator = seeded(seed)
    for kind in product((False, True), (False, True)):
        rows, columns = (
            [i for i, one in enumerate(parts) if one.mlp == mlp and len(one.basis)]
            for parts, mlp in zip((sources, targets), kind, strict=True)
        )
        if not rows or not columns:
            continue
        at = torch.tensor(rows)[:, None], torch.tensor(columns)
        w, r = (_padded([parts[i].weight for i in at]) for parts, at in ((sources, rows), (targets, columns)))
        total, squares, reached = (torch.zeros(len(rows), len(columns), dtype=torch.float64) for _ in range(3))
        for _ in range(draws):
            block = random_block(w.shape[1], r.shape[1], stream_width(model), generator, w)
            drawn = (w @ block.square() @ r.mT).sqrt().double()
            total, squares, reached = total + drawn, squares + drawn.square(), reached + (drawn >= seen[at])
        mean[at] = (total / draws).to(seen)
        sd[at] = ((squares - total.square() / draws) / (draws - 1)).clamp_min(0).sqrt().to(seen)
        p[at] = ((reached + 1) / (draws + 1)).to(p)
    unseen = seen.isnan()
    return mean.masked_fill(unseen, torch.nan), sd.masked_fill(unseen, torch.nan), p.masked_fill(unseen, torch.nan)


def _padded(parts: list[Tensor]) -> Float[Tensor, "part rank *d_model"]:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def _by_layer(names: list[str]) -> dict[str, list[int]]:
    """Indices of the names of each layer."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault(re.split("[HKM]", name)[0], []).append(i)
    return found


def demo(model: "HookedTransformer") -> Overlap | Needs:
    """Every pair of the model, with 40 draws; one layer without an MLP has no pairs."""
    return lacking(model, tokens=False) or measure_overlap(model, draws=40)
