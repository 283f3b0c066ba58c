"""Principal angles between what one component writes and what another reads, compared with random subspaces."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import InputError, did_you_mean
from hooklens.plugins.weights.components import random_block, readers, stream_width, writers
from hooklens.plugins.weights.needs import Needs, lacking
from hooklens.results.result import Result, Table
from hooklens.results.statistics import null_p, q_values, quantiles

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_DRAWS = 200  # random subspaces: each takes a QR decomposition


@dataclass(frozen=True, eq=False)
class PrincipalAngles(Result):
    """Cosines of the principal angles between a writer's and a reader's subspace, compared with random subspaces."""

    ranked_by = "smallness of the angle"

    terms = {
        "random": "the same cosine between random subspaces of these dimensions",
    }

    writer: str
    reader: str
    cosine: Float[Tensor, "angle"]
    null: Float[Tensor, "draw angle"]

    @property
    def p(self) -> Float[Tensor, "angle"]:
        """How often the corresponding angle between random subspaces of the same dimensions is as small."""
        return null_p(self.cosine, self.null)

    @property
    def q(self) -> Float[Tensor, "angle"]:
        """`p` over the angles, as false discovery rates."""
        return q_values(self.p)

    def table(self, n: int | None = 12) -> Table:
        """One row per angle, the smallest first."""
        columns = ("angle", "degrees", "cosine", "random", "p", "q")
        degrees = self.cosine.clamp(-1, 1).arccos().rad2deg()
        parts = zip(*(one.tolist() for one in (degrees, self.cosine, self.null.mean(0), self.p, self.q)), strict=True)
        return Table(columns, [(i, *row) for i, row in enumerate(parts)]).head(n)

    def figure(self) -> Any:
        """The cosines, with the band of random subspaces."""
        from hooklens.viz.curves import lines

        ends = quantiles(self.null, (0.025, 0.975))
        values = {f"{self.writer} to {self.reader}": self.cosine, "random subspaces": self.null.mean(0)}
        axes: dict[str, Any] = {"x_title": "principal angle, smallest first", "y_title": "cosine"}
        return lines(values, bands={"random subspaces": (ends[0], ends[1])}, title="Principal angles", **axes)


def measure_angles(
    model: "HookedTransformer", writer: str, reader: str, *, draws: int = _DRAWS, seed: int = 0
) -> PrincipalAngles:
    """How close are the subspace that `writer` ("L0H1", "MLP2") writes and the one that `reader` ("L3H0.q") reads?

    >>> from hooklens.testing import tiny_model
    >>> measure_angles(tiny_model(), "L0H1", "L1H0.q", draws=20).cosine.shape
    torch.Size([4])

    Reference: Bjorck and Golub (1973), "Numerical Methods for Computing Angles Between Linear Subspaces".
    """
    sources, targets = ({one.name: one for one in parts(model, True)} for parts in (writers, readers))
    if writer not in sources:
        raise did_you_mean("writer", writer, sources)
    if reader not in targets:
        raise did_you_mean("reader", reader, targets)
    a, b = sources[writer].basis, targets[reader].basis
    if not len(a) or not len(b):
        raise InputError(f"{writer if not len(a) else reader} is 0 everywhere, so it has no subspace")
    generator = seeded(seed)
    random = [random_block(len(a), len(b), stream_width(model), generator, a) for _ in range(draws)]
    found = torch.linalg.svdvals(a @ b.mT).clamp_max(1)
    return PrincipalAngles(writer, reader, found, torch.stack([torch.linalg.svdvals(one) for one in random]))


def demo(model: "HookedTransformer") -> PrincipalAngles | Needs:
    """The first head against its layer's MLP, or against its own queries if there is none."""
    lacks = lacking(model, tokens=False)
    reader = "L0H0.q" if model.cfg.attn_only else "MLP0"
    return lacks or measure_angles(model, "L0H0", reader, draws=20)
