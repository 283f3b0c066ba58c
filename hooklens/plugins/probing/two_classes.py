"""Two-class tasks at one point of a model, for comparing directions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from hooklens.core.errors import InputError, WrongType
from hooklens.core.names import Where
from hooklens.plugins.probing.gathering import gather
from hooklens.plugins.probing.scoring import as_rows
from hooklens.plugins.probing.task import ProbeTask

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


def task_rows(
    model: "HookedTransformer", tasks: Sequence[ProbeTask], site: Where
) -> tuple[str, torch.dtype, list[np.ndarray]]:
    """Return the point's full name, the dtype of its activations, and each task's rows.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.plugins.probing.labels import odd_first
    >>> point, dtype, rows = task_rows(model := tiny_model(), [odd_first(model)], ("resid_post", 0))
    >>> point, rows[0].shape
    ('blocks.0.hook_resid_post', (40, 8))
    """
    if not isinstance(tasks, Sequence) or not tasks or not all(isinstance(task, ProbeTask) for task in tasks):
        raise WrongType(f"tasks is a list of at least one ProbeTask, see read_task; got {tasks!r:.60}")
    for task in tasks:
        if len(task.classes) != 2 or len(task.label.unique()) != 2:
            raise InputError(f"a direction needs examples of two classes, {task.name!r} has {task.classes}; choose two")
    gathered = [gather(model, task, site=site) for task in tasks]
    points = gathered[0].points
    if len(points) != 1:
        raise InputError(f"directions are compared at a single point, got {', '.join(points)}; give ('name', layer)")
    return points[0], gathered[0].x.dtype, [as_rows(acts.x[0]) for acts in gathered]
