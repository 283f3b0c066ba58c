"""Pictures of a run: its losses and its learning rate against steps."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.training.recorder import EVALUATIONS, STEPS, recorded_evaluations, recorded_steps
from hooklens.training.row_file import Rows
from hooklens.training.run_folder import RunFolder

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_POINTS = 400  # of a line: more are not seen, and a page of a long run would grow without bound
_UNITS = {"cross_entropy": " (nats)", "stablemax": " (nats)"}


def rows_so_far(folder: Path) -> tuple[Rows | None, Rows | None]:
    """The recorded steps and evaluations of a run; None where nothing is recorded yet, as in a run that just began."""
    return _some(folder / STEPS, recorded_steps), _some(folder / EVALUATIONS, recorded_evaluations)


def _some(path: Path, read: Callable[[Path], Rows]) -> Rows | None:
    if not path.is_file() or not path.stat().st_size:
        return None
    rows = read(path.parent)
    return rows if len(rows.steps) else None


class Thinned:
    """Series of steps with at most 400 points, at equal ratios of the step: the first steps each have a point.

    >>> thin = Thinned(np.arange(4))
    >>> thin.at, thin.means(np.array([4.0, 3.0, 2.0, 1.0]))
    (tensor([1., 2., 3., 4.], dtype=torch.float64), tensor([4., 3., 2., 1.], dtype=torch.float64))

    `at` is the number of steps done at each point. A point stands for all steps after the one before it.
    """

    def __init__(self, steps: NDArray, most: int = _POINTS):
        n = len(steps)
        self.starts = np.arange(n)
        if n > most:
            self.starts = np.unique(np.round(np.geomspace(1, n, most)).astype(np.int64)) - 1
        self._stops = np.append(self.starts[1:], n)
        self.at = torch.from_numpy(np.asarray(steps)[self._stops - 1] + 1.0)

    def means(self, values: NDArray) -> Float[Tensor, "point *layer"]:
        """The mean of the steps of each point."""
        sizes = (self._stops - self.starts).reshape(-1, *[1] * (values.ndim - 1))
        return torch.from_numpy(np.add.reduceat(values.astype(np.float64), self.starts, axis=0) / sizes)

    def largest(self, values: NDArray) -> Float[Tensor, "point *layer"]:
        """The largest of the steps of each point."""
        return torch.from_numpy(np.maximum.reduceat(values.astype(np.float64), self.starts, axis=0))


def loss_unit(identity: Mapping[str, Any]) -> str:
    """The unit of a run's loss as a title has it; that of a loss which is not ours is unknown.

    >>> loss_unit({"settings": {"loss": {"part": "cross_entropy"}}}), loss_unit({"settings": {}})
    (' (nats)', '')
    """
    return _UNITS.get(identity["settings"].get("loss", {}).get("part"), "")


def loss_figure(steps: Rows, evaluations: Rows | None, unit: str = "") -> "Figure":
    """Training and held-out loss against steps, on logarithmic axes; the untrained model's loss is a dashed line."""
    from hooklens.viz.curves import lines

    thin = Thinned(steps.steps)
    values, at, marks = {"training": thin.means(steps["loss"])}, {"training": thin.at}, {}
    if evaluations is not None:
        after = evaluations.steps > 0  # step 0 has no place on a logarithmic axis
        values["held out"] = torch.from_numpy(evaluations["loss"][after].astype(np.float64))
        at["held out"] = torch.from_numpy(evaluations.steps[after].astype(np.float64))
        marks = dict.fromkeys(["held out, untrained"][: int((~after).sum())], float(evaluations["loss"][0]))
    return lines(values, at, title="Loss", x_title="step", y_title=f"loss per target{unit}", marks=marks, log="xy")


def rate_figure(steps: Rows) -> "Figure":
    """The learning rate of every step."""
    from hooklens.viz.curves import lines

    thin = Thinned(steps.steps)
    name, rates = "learning rate", thin.means(steps["rate"])
    figure = lines({name: rates}, thin.at, title="Learning rate", x_title="step", y_title=name, log="x")
    return figure.update_layout(height=260)


def draw_run(folder: Path) -> "Figure":
    """The losses above the learning rate."""
    from hooklens.viz.small_multiples import panels

    steps, evaluations = rows_so_far(folder)
    if steps is None:
        raise InputError(f"the run in {str(folder)!r} has no recorded step to draw yet; wait for its first steps")
    unit = loss_unit(RunFolder(folder).identity())
    return panels([loss_figure(steps, evaluations, unit), rate_figure(steps)])
