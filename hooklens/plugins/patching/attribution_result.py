"""What attribution patching returns: estimates for a whole grid, and exact effects of some cells beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.plugins.patching.grid import cell_name, draw_grid, largest_first
from hooklens.plugins.patching.two_runs import TwoRuns
from hooklens.results.result import Result, Table
from hooklens.results.statistics import DRAWS, correlation, mean_interval, rank_correlation

Grid = Float[Tensor, "*grid"]


@dataclass(frozen=True, eq=False)
class AttributionPatching(TwoRuns, Result):
    """The estimated effect of every patch of a grid, pair by pair, and exact effects of some cells as its control.

    `per_pair` is (clean - corrupted) . gradient at the corrupted run: the change of the metric if the metric were
    linear. The checked cells are the `n_top` of largest estimate, then as many drawn from the rest.
    """

    ranked_by = "estimate"

    per_pair: Float[Tensor, "pair *grid"]
    clean_per_pair: Float[Tensor, "pair"]
    corrupted_per_pair: Float[Tensor, "pair"]
    site: str
    by: tuple[str, ...]
    labels: dict[str, list[str]]
    checked: Int[Tensor, "checked axis"]
    exact_per_pair: Float[Tensor, "pair checked"]
    n_top: int
    group: Int[Tensor, "pair"]

    @property
    def effect(self) -> Grid:
        """The estimated change of the metric when clean is written into the corrupted run, mean over pairs."""
        return self.per_pair.mean(0)

    def interval(self, level: float = 0.95, *, draws: int = DRAWS, seed: int = 0) -> tuple[Grid, Grid]:
        """Both ends of `effect`, over groups of pairs: of the estimate's mean, not of its distance to the truth."""
        return mean_interval(self.per_pair, group=self.group, level=level, draws=draws, seed=seed)

    @property
    def exact(self) -> Float[Tensor, "checked"]:
        """What patching itself finds for the checked cells, mean over pairs."""
        return self.exact_per_pair.mean(0)

    @property
    def estimated(self) -> Float[Tensor, "checked"]:
        """The estimates of the checked cells."""
        return torch.stack([self.effect[tuple(i)] for i in self.checked.tolist()]) if len(self.checked) else self.exact

    @property
    def correlation(self) -> float:
        """Pearson's correlation of estimate and exact effect over the checked cells; NaN where none was checked."""
        return float(correlation(self.estimated, self.exact)) if len(self.checked) else float("nan")

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation over the checked cells."""
        return float(rank_correlation(self.estimated, self.exact)) if len(self.checked) else float("nan")

    @property
    def largest_error(self) -> float:
        """How far an estimate of a checked cell lies from its exact effect, at most; NaN where none was checked."""
        return float((self.estimated - self.exact).abs().max()) if len(self.checked) else float("nan")

    def order(self) -> list[tuple[int, ...]]:
        """Every grid index, the largest estimate first, whatever its sign."""
        return largest_first(self.effect)

    def name_of(self, index: Sequence[int]) -> str:
        """What a grid index is called: L5H1, L3 ' Mary' (4), L2N17."""
        return cell_name(self.by, self.labels, index)

    def table(self, n: int | None = 20) -> Table:
        """The cells of largest estimate, with their exact effect where it was worked out."""
        effect, (low, high) = self.effect, self.interval()
        exact = {tuple(index): value for index, value in zip(self.checked.tolist(), self.exact.tolist(), strict=True)}
        many = int(self.group.max()) > 0
        parts = (effect, low, high) if many else (effect,)
        rows = [
            (self.name_of(index), *(float(part[index]) for part in parts), exact.get(index))
            for index in self.order()[:n]
        ]
        return Table((self.site, "estimate", *(("95% low", "95% high") if many else ()), "exact"), rows)

    def figure(self) -> Any:
        """The estimates: a heat map over two axes, bars over one."""
        checked = (
            f"; correlation with {len(self.checked)} exact ones {self.correlation:.2f}" if len(self.checked) else ""
        )
        ends = self.interval() if len(self.by) == 1 else None
        return draw_grid(
            self.effect,
            self.by,
            labels=self.labels,
            title=f"{self.site}: estimated effect{checked}",
            name="estimate",
            ends=ends,
        )

    def check_figure(self) -> Any:
        """The checked cells by their exact effect and its estimate; on the diagonal the two agree."""
        from hooklens.viz.curves import scatter

        names = [self.name_of(index) for index in self.checked.tolist()]
        title = f"{self.site}: attribution against patching"
        drawn = scatter(self.exact, self.estimated, names, title, x_title="exact effect", y_title="estimate")
        low, high = (float(end) for end in self.exact.aminmax())
        return drawn.add_shape(type="line", x0=low, x1=high, y0=low, y1=high, line={"dash": "dot", "width": 1})
