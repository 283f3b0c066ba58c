"""A run of training on disk: its losses, its checkpoints, its picture. It can be read while it is being written."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hooklens.core.arguments import path_of
from hooklens.core.errors import HooklensError, InputError
from hooklens.pretrained.checkpoint import load_checkpoint
from hooklens.results.table import Table
from hooklens.training.recorder import recorded_evaluations, recorded_snapshots, recorded_steps
from hooklens.training.row_file import Rows
from hooklens.training.run_drawing import draw_run, rows_so_far
from hooklens.training.run_folder import RunFolder
from hooklens.training.snapshots import Snapshots

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from hooklens.model.transformer import HookedTransformer


@dataclass(frozen=True)
class Checkpoint:
    """The model of a run after `step` steps; `load()` reads it."""

    step: int
    path: Path
    #: Keeps the run of a temporary folder, whose files go with it.
    run: "Run | None" = field(default=None, repr=False, compare=False)

    def load(self, *, device: Any = None) -> "HookedTransformer":
        """The model, ready for any method."""
        return load_checkpoint(self.path, device=device)


@dataclass(frozen=True, eq=False)
class Run:
    """What was recorded in the folder of a run.

    >>> from hooklens.data.modular import modular_arithmetic
    >>> from hooklens.testing import tiny_model
    >>> from hooklens.training.loop import train
    >>> run = train(tiny_model(d_vocab=7), modular_arithmetic(p=5, fraction=0.8), steps=2)
    >>> [checkpoint.step for checkpoint in run.checkpoints()]
    [0, 1, 2]
    """

    path: Path

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The run's settings, configuration, data and number of steps, as plain values."""
        return RunFolder(self.path).identity()

    @property
    def layers(self) -> list[str]:
        """The layers in the order of recorded norms."""
        return self.identity["layers"]

    def __repr__(self) -> str:
        """How far the run is, as far as its files can be read."""
        try:
            planned = self.identity["steps"]
            steps, evaluations = rows_so_far(self.path)
        except (HooklensError, OSError):
            return f"Run({str(self.path)!r})"
        said = [f"{0 if steps is None else len(steps.steps):,} of {planned:,} steps"]
        if steps is not None:
            said.append(f"loss {steps['loss'][-1]:.4g}")
        if evaluations is not None:
            said.append(f"held out {evaluations['loss'][-1]:.4g}")
        return f"Run({str(self.path)!r}: {', '.join(said)})"

    def steps(self) -> Rows:
        """Every step so far: loss, accuracy, rate, gradient, seconds, gradient_norms, parameter_norms, change_norms."""
        return recorded_steps(self.path)

    def evaluations(self) -> Rows:
        """Every evaluation so far: loss, accuracy, histogram, by_position."""
        return recorded_evaluations(self.path)

    def snapshots(self) -> Snapshots:
        """The activations that `Settings(snapshots=...)` chose, after every evaluation so far."""
        return recorded_snapshots(self.path)

    def update_ratios(self) -> NDArray:
        """The norm of each step's change over that of the parameters, [step, layer]; about 1e-3 is usual."""
        rows = self.steps()
        norms = rows["parameter_norms"]
        return np.divide(rows["change_norms"], norms, out=np.full_like(norms, np.nan), where=norms > 0)

    @property
    def steps_done(self) -> int:
        """How many steps are recorded."""
        return len(self.steps().steps)

    @property
    def loss(self) -> NDArray:
        """The training loss of every step."""
        return self.steps()["loss"]

    @property
    def held_out_loss(self) -> NDArray:
        """The held-out loss of every evaluation; `evaluations().steps` says after which step."""
        return self.evaluations()["loss"]

    @property
    def accuracy(self) -> NDArray:
        """The share of each step's targets that had the largest output; NaN where targets are vectors."""
        return self.steps()["accuracy"]

    @property
    def held_out_accuracy(self) -> NDArray:
        """The same of every evaluation's held-out targets."""
        return self.evaluations()["accuracy"]

    def checkpoints(self) -> list[Checkpoint]:
        """The kept models, from the untrained to the last."""
        folder = RunFolder(self.path)
        return [Checkpoint(step, folder.checkpoint(step), self) for step in folder.checkpoint_steps()]

    def figure(self) -> "Figure":
        """Training and held-out loss against steps on logarithmic axes, above the learning rate.

        It can be drawn while the run is under way. A run without a recorded step raises.
        """
        return draw_run(self.path)

    def table(self, n: int | None = None) -> Table:
        """The evaluations: step, training loss there, held-out loss."""
        steps, held_out = self.steps(), self.evaluations()
        at = np.clip(held_out.steps - 1, 0, None)
        rows = [
            (int(step), float(steps["loss"][i]) if i < len(steps.steps) else float("nan"), float(loss))
            for step, i, loss in zip(held_out.steps, at, held_out["loss"], strict=True)
        ]
        return Table(("step", "training loss", "held-out loss"), rows).head(n)


def checkpoints(run: Run | str | os.PathLike) -> list[Checkpoint]:
    """The checkpoints of a run, or of the folder of one."""
    run = run if isinstance(run, Run) else open_run(run)
    return run.checkpoints()


def open_run(path: str | os.PathLike) -> Run:
    """The run in a folder, finished or under way."""
    folder = RunFolder(path_of(path, "run"))
    if not folder.exists:
        below = [str(inner.parent) for inner in sorted(folder.path.glob("*/run.json"))[:3]]
        better = f"give one of those in it, such as {below[0]!r}" if below else "give the folder of one"
        raise InputError(f"{str(path)!r} holds no run of hl.train (no run.json); {better}")
    return Run(folder.path)
