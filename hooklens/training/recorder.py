"""What a run records: every step its loss and norms, at evaluations the loss of every held-out target."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hooklens.training.row_file import RowFile, Rows, read_rows

STEPS, EVALUATIONS = "steps.rows", "evaluations.rows"
N_BINS = 60
#: Edges of the histogram of losses, in nats: the first bin holds what is below 1e-4, the last what is above 100.
LOSS_EDGES: NDArray = np.logspace(-4, 2, N_BINS - 1)


class Recorder:
    """Writes the record of a run while it trains.

    A step's row holds the loss, the learning rate, the norm of the whole gradient before clipping, its seconds, and for
    each layer the norms of gradient, parameters and change. An evaluation's row holds the held-out loss, a histogram of
    the losses of all targets, and the mean loss at each position.
    """

    def __init__(self, folder: Path, layers: Sequence[str], n_positions: int, *, keep: int = 0):
        n = len(layers)
        widths = {"loss": 1, "rate": 1, "gradient": 1, "seconds": 1}
        widths |= {"gradient_norms": n, "parameter_norms": n, "change_norms": n}
        self._steps = RowFile(folder / STEPS, widths, keep=keep)
        # The evaluation after step k belongs to what is kept up to step k.
        at_end = {"loss": 1, "histogram": N_BINS, "by_position": n_positions}
        self._evaluations = RowFile(folder / EVALUATIONS, at_end, keep=keep + 1 if keep else 0)

    def step(self, step: int, scalars: Sequence[float], norms: Float[Tensor, "kind layer"]) -> None:
        """Record loss, rate, gradient norm and seconds, and for each layer the norms of gradient, parameters, change."""
        self._steps.append(step, [*([value] for value in scalars), *norms.numpy()])

    def evaluation(self, step: int, losses: Float[Tensor, "row pos"]) -> float:
        """Record the losses of all held-out targets (NaN where none counts) after `step` steps; returns their mean."""
        mean = float(losses.nanmean())
        per_target = losses[~losses.isnan()].double().numpy()
        histogram = np.bincount(np.digitize(per_target, LOSS_EDGES), minlength=N_BINS)
        by_position = torch.nanmean(losses, 0).float().numpy()
        self._evaluations.append(step, [[mean], histogram, by_position])
        self._evaluations.flush()
        return mean

    def flush(self, *, to_disk: bool = False) -> None:
        """Make what was recorded visible to readers."""
        self._steps.flush(to_disk=to_disk)
        self._evaluations.flush(to_disk=to_disk)

    def close(self) -> None:
        """Close the files."""
        self._steps.close()
        self._evaluations.close()


def recorded_steps(folder: Path) -> Rows:
    """The rows of all steps so far."""
    return read_rows(folder / STEPS)


def recorded_evaluations(folder: Path) -> Rows:
    """The rows of all evaluations so far."""
    return read_rows(folder / EVALUATIONS)
