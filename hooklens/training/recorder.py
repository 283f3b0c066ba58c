"""What a run records: every step its loss and norms, at evaluations the held-out losses and snapshots."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hooklens.core.errors import FileRefused, InputError
from hooklens.training.row_file import RowFile, Rows, lost_rows, read_rows
from hooklens.training.run_folder import RunFolder
from hooklens.training.snapshots import Snapshots, SnapshotTaker
from hooklens.training.tensorboard_log import TensorBoardLog

STEPS, EVALUATIONS, SNAPSHOTS = "steps.rows", "evaluations.rows", "snapshots.rows"
N_BINS = 60
#: Edges of the histogram of losses, in nats: the first bin holds what is below 1e-4, the last what is above 100.
LOSS_EDGES: NDArray = np.logspace(-4, 2, N_BINS - 1)


class Recorder:
    """Writes the record of a run while it trains.

    A step's row holds the loss, the share of targets with the largest output, the learning rate, the norm of the whole
    gradient before clipping, its seconds, and for each layer the norms of gradient, parameters and change. An
    evaluation's row holds the held-out loss and accuracy, a histogram of the losses of all targets, and the mean loss
    at each position. The accuracy is NaN where targets are vectors. Snapshots are taken at evaluations.
    """

    def __init__(
        self,
        folder: Path,
        layers: Sequence[str],
        n_positions: int,
        *,
        keep: int = 0,
        rows: Mapping[str, int] | None = None,
    ):
        """Go on after `keep` steps; `rows` says how many rows each file must have by then."""
        n = len(layers)
        widths = {"loss": 1, "accuracy": 1, "rate": 1, "gradient": 1, "seconds": 1}
        widths |= {"gradient_norms": n, "parameter_norms": n, "change_norms": n}
        self.folder, self.layers, self.keep = folder, layers, keep
        self.tensorboard: TensorBoardLog | None = None
        self._needed = {STEPS: keep, **(rows or {})} if keep else {}
        self._taker: SnapshotTaker | None = None
        self._files: dict[str, RowFile] = {}
        self._steps = self._file(STEPS, keep, widths)
        at_end = {"loss": 1, "accuracy": 1, "histogram": N_BINS, "by_position": n_positions}
        self._evaluations = self._at_evaluations(EVALUATIONS, at_end)

    def _at_evaluations(self, name: str, widths: Mapping[str, int], notes: Mapping[str, Any] | None = None) -> RowFile:
        # The evaluation after step k belongs to what is kept up to step k.
        return self._file(name, self.keep + 1 if self.keep else 0, widths, notes)

    def _file(self, name: str, keep: int, widths: Mapping[str, int], notes: Mapping[str, Any] | None = None) -> RowFile:
        try:
            self._files[name] = RowFile(
                self.folder / name, widths, keep=keep, notes=notes, at_least=self._needed.get(name, 0)
            )
        except BaseException:
            self.close()
            raise
        return self._files[name]

    def rows(self) -> dict[str, int]:
        """How many rows each file has."""
        return {name: file.n_rows for name, file in self._files.items()}

    def take_snapshots(self, taker: SnapshotTaker, shapes: Mapping[str, list[int]]) -> None:
        """Take snapshots at all evaluations from now on."""
        widths = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        notes = {"shapes": dict(shapes), "prompts": taker.prompts.tolist()}
        self._taker, self._snapshots = taker, self._at_evaluations(SNAPSHOTS, widths, notes)

    def step(self, step: int, scalars: Sequence[float], norms: Float[Tensor, "kind layer"]) -> None:
        """Record loss, accuracy, rate, gradient norm, seconds; each layer's norms of gradient, parameters, change."""
        self._steps.append(step, [*([value] for value in scalars), *norms.numpy()])
        if self.tensorboard is not None:
            self.tensorboard.step(step, scalars, norms)

    def evaluation(
        self, step: int, losses: Float[Tensor, "row pos"] | None, is_correct: Float[Tensor, "row pos"] | None
    ) -> None:
        """Record losses and hits of all held-out targets (NaN where none counts) after `step` steps, and a snapshot."""
        if losses is not None and is_correct is not None:
            mean, accuracy = float(losses.nanmean()), float(is_correct.nanmean())
            per_target = losses[~losses.isnan()].double().numpy()
            histogram = np.bincount(np.digitize(per_target, LOSS_EDGES), minlength=N_BINS)
            by_position = torch.nanmean(losses, 0).float().numpy()
            self._evaluations.append(step, [[mean], [accuracy], histogram, by_position])
            if self.tensorboard is not None:
                self.tensorboard.evaluation(step, mean, accuracy)
        if self._taker is not None:
            self._snapshots.append(step, [value.numpy() for value in self._taker.take().values()])
        self.flush()

    def flush(self, *, to_disk: bool = False) -> None:
        """Make what was recorded visible to readers."""
        for file in self._files.values():
            file.flush(to_disk=to_disk)

    def close(self) -> None:
        """Close the files, also if one of them cannot be written any more."""
        with contextlib.ExitStack() as closing:
            for file in self._files.values():
                closing.callback(file.close)
            if self.tensorboard is not None:
                closing.callback(self.tensorboard.close)


def ends_early(evaluations: Rows, settings: Mapping[str, Any]) -> bool:
    """Whether a run with these settings ends after these evaluations: its loss stopped falling, or the task is solved.

    >>> so_far = Rows(np.array([0, 5, 10, 15]), {"accuracy": np.array([0.1, 0.6, 0.8, 0.9])})
    >>> ends_early(so_far, {"solved": 0.5, "solved_for": 10}), ends_early(so_far, {"solved": 0.7, "solved_for": 10})
    (True, False)
    """
    patience, solved = settings.get("patience"), settings.get("solved")
    if patience is not None and len(evaluations.steps) - 1 - int(evaluations["loss"].argmin()) >= patience:
        return True
    if solved is None:
        return False
    unsolved = evaluations.steps[~(evaluations["accuracy"] > solved)]
    since = evaluations.steps[evaluations.steps > max(unsolved, default=-1)]
    return len(since) > 0 and int(since[-1] - since[0]) >= settings["solved_for"]


def recorded_steps(folder: Path) -> Rows:
    """The rows of all steps so far."""
    return _recorded(folder / STEPS)


def recorded_evaluations(folder: Path) -> Rows:
    """The rows of all evaluations so far."""
    return _recorded(folder / EVALUATIONS)


def _recorded(path: Path) -> Rows:
    """The rows of a file, none lost; a run that has just begun may not have written its first line."""
    needed = RunFolder(path.parent).rows_of_state().get(path.name, 0)  # first: rows are written before a state
    if not path.is_file() or not path.stat().st_size:
        folder = RunFolder(path.parent)
        if any(folder.checkpoint_steps()) and not folder.is_being_written():
            raise FileRefused(
                f"the run in {str(path.parent)!r} has checkpoints of later steps and no {path.name}: the file was "
                "removed or emptied, or the run killed as it began; put the file back, or train it again"
            )
        raise InputError(f"the run in {str(path.parent)!r} has no {path.name} yet; wait for its first steps")
    rows = read_rows(path)
    if len(rows.steps) < needed:
        raise lost_rows(path, len(rows.steps), needed)
    return rows


def recorded_snapshots(folder: Path) -> Snapshots:
    """The snapshots of all evaluations so far."""
    if not (folder / SNAPSHOTS).exists():
        raise InputError(f"this run takes no snapshots; train with Settings(snapshots=...) in another folder: {folder}")
    rows = read_rows(folder / SNAPSHOTS)
    shapes = rows.notes["shapes"]
    values = {name: column.reshape(len(rows.steps), *shapes[name]) for name, column in rows.columns.items()}
    return Snapshots(rows.steps, rows.notes["prompts"], values)
