"""Principal angles between what one component writes and what another reads, compared with random subspaces."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.component import Component
from hooklens.core.errors import InputError, did_you_mean
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.weights.components import Part, random_block, readers, stream_width, writers
from hooklens.plugins.weights.matrices import Asked, need_sum
from hooklens.plugins.weights.needs import Needs, lacking
from hooklens.results.result import Result, Table
from hooklens.results.statistics import null_p, q_values, quantiles
from hooklens.sweeps.nodes import read_receivers, read_senders

_DRAWS = 200  # random subspaces: each takes a QR decomposition


@dataclass(frozen=True, eq=False)
class PrincipalAngles(Result):
    """Cosines of the principal angles between a writer's and a reader's subspace, compared with random subspaces."""

    ranked_by = "smallness of the angle"

    terms = {"random": "the same cosine between random subspaces of these dimensions"}

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
        degrees = self.cosine.clamp(-1, 1).arccos().rad2deg()
        columns = (torch.arange(len(degrees)), degrees, self.cosine, self.null.mean(0), self.p, self.q)
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        return Table(("angle", "degrees", "cosine", "random", "p", "q"), rows).head(n)

    def figure(self) -> Any:
        """The cosines, with the band of random subspaces."""
        from hooklens.viz.curves import lines

        ends = quantiles(self.null, (0.025, 0.975))
        values = {f"{self.writer} to {self.reader}": self.cosine, "random subspaces": self.null.mean(0)}
        bands, x_title = {"random subspaces": (ends[0], ends[1])}, "principal angle, smallest first"
        return lines(values, bands=bands, title="Principal angles", x_title=x_title, y_title="cosine")


def measure_angles(
    model: HookedTransformer, writer: Asked, reader: Asked, *, draws: int = _DRAWS, seed: int = 0
) -> PrincipalAngles:
    """How close are the subspace that `writer` ("L0H1", "MLP2") writes and the one that `reader` ("L3H0.q") reads?

    >>> from hooklens.testing import tiny_model
    >>> measure_angles(tiny_model(), "L0H1", "L1H0.q", draws=20).cosine.shape
    torch.Size([4])

    Reference: Bjorck and Golub (1973), "Numerical Methods for Computing Angles Between Linear Subspaces".
    """
    whole("draws", draws, 1)
    need_sum(model)
    writer, a = _basis(writer, "writer", read_senders(model, writer), writers(model, True))
    reader, b = _basis(reader, "reader", read_receivers(model, reader), readers(model, True))
    generator, width = seeded(seed), stream_width(model)
    null = [torch.linalg.svdvals(random_block(len(a), len(b), width, generator, a)) for _ in range(draws)]
    return PrincipalAngles(writer, reader, torch.linalg.svdvals(a @ b.mT).clamp_max(1), torch.stack(null))


def _basis(
    asked: Any, what: str, nodes: Sequence[Component], parts: Iterable[Part]
) -> tuple[str, Float[Tensor, "rank d_model"]]:
    """The name and the subspace of the one component asked for."""
    bases = {part.name: part.basis for part in parts}
    name = nodes[0].name if len(nodes) == 1 else str(asked)
    if name not in bases:
        raise did_you_mean(what, name, bases)
    if not len(bases[name]):
        raise InputError(f"{name} is 0 everywhere, so it has no subspace")
    return name, bases[name]


def demo(model: HookedTransformer) -> PrincipalAngles | Needs:
    """The first head against its layer's MLP, or against its own queries if there is none."""
    lacks = lacking(model, tokens=False)
    reader = "L0H0.q" if model.cfg.attn_only else "MLP0"
    return lacks or measure_angles(model, "L0H0", reader, draws=20)
