"""The task that a run was trained on, made again from what the run wrote down."""

import os
from collections.abc import Callable
from typing import TypeVar

from hooklens.core.errors import InputError
from hooklens.data.batches import TrainingData
from hooklens.training.run_folder import RunFolder
from hooklens.training.training_run import Checkpoint, Run, open_run

Task = TypeVar("Task", bound=TrainingData)


def trained_task(run: Run | str | os.PathLike, task: str, make: Callable[..., Task]) -> Task:
    """The data of a run; refused unless they are those of the task, which `hl.data` has under the name of `make`.

    >>> from hooklens.data.modular import modular_arithmetic
    >>> from hooklens.testing import tiny_model
    >>> from hooklens.training.loop import train
    >>> run = train(tiny_model(d_vocab=6), modular_arithmetic(p=5, fraction=0.8), steps=2)
    >>> trained_task(run, "modular", modular_arithmetic).p
    5
    """
    run = run if isinstance(run, Run) else open_run(run)
    data = dict(run.identity["data"])
    if (seen := data.pop("task", None)) != task:
        raise InputError(f"the run in {str(run.path)!r} was not trained on hl.data.{make.__name__} but on {seen!r}")
    return make(**data)


def kept_checkpoints(run: Run) -> list[Checkpoint]:
    """The checkpoints of a run; refused if there is none."""
    kept = run.checkpoints()
    if not kept:
        begun = RunFolder(run.path).is_being_written() or not run.steps_done
        what = "wait for its first steps" if begun else "they were removed; train again in another folder"
        raise InputError(f"the run in {str(run.path)!r} has no checkpoint: {what}")
    return kept
