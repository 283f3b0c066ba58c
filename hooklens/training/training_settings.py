"""The settings of a run: together with the model, the data and the number of steps they determine it bit for bit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

import numpy as np

from hooklens.core.arguments import real, seed_number, whole
from hooklens.core.errors import InputError, WrongType, did_you_mean
from hooklens.model.config import part
from hooklens.training.losses import CrossEntropy
from hooklens.training.optimizers import AdamW
from hooklens.training.schedules import Cosine
from hooklens.training.snapshots import checked_choice, checked_prompts

_PRECISIONS = ("model", "bfloat16")
_SLOTS = ("optimizer", "schedule", "loss")
_SOLVED_FOR = 500  # steps


@dataclass(frozen=True)
class Settings:
    """How to train. Parts may be given as objects, by name, or as tables of a TOML file.

    >>> settings = Settings(batch=8, schedule="constant")
    >>> settings.schedule, Settings.from_json(settings.to_json()) == settings
    (Constant(warmup=0), True)

    `batch` is the number of rows of a step over all processes; `accumulate` splits it into that many passes. `clip`
    bounds the norm of the whole gradient (None: no bound). `precision` "bfloat16" runs the passes under autocast with
    the weights in the model's dtype. `evaluate` and `checkpoints` are numbers of moments in the run: evaluations at
    equal distances, checkpoints at equal ratios. `patience` stops after as many evaluations without a lower loss,
    `solved` once the held-out accuracy was above it at all evaluations of the last `solved_for` steps. `seed`
    determines the dropout masks (model and data have seeds of their own).

    `snapshots` are activations to keep at every evaluation: names of hook points, short names ("pattern": all layers),
    or a name with layer and head (["pattern", 0, 1]). They are taken on `snapshot_prompts`: token ids, equally many in
    each prompt, or the number of rows to use of the held-out data.
    """

    batch: int = 32
    accumulate: int = 1
    optimizer: Any = field(default_factory=AdamW)
    schedule: Any = field(default_factory=Cosine)
    loss: Any = field(default_factory=CrossEntropy)
    clip: float | None = None
    precision: str = "model"
    seed: int = 0
    evaluate: int = 50
    checkpoints: int = 20
    patience: int | None = None
    solved: float | None = None
    solved_for: int = _SOLVED_FOR
    snapshots: Any = ()
    snapshot_prompts: Any = 2

    def __post_init__(self) -> None:
        for name in _SLOTS:
            if getattr(self, name) is None:
                raise WrongType(
                    f"{name} is a part of hl.training or its name, and not None; leave it out for the default"
                )
            object.__setattr__(self, name, part(name, getattr(self, name)))
        for name, least in (("batch", 1), ("accumulate", 1), ("evaluate", 1), ("checkpoints", 1)):
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        if self.batch % self.accumulate:
            raise InputError(f"a batch of {self.batch} rows does not split into {self.accumulate} equal passes")
        if self.clip is not None and not _is_positive(self.clip):
            raise InputError(
                f"clip bounds the gradient's norm: a finite number above 0, or None for no bound; got {self.clip!r:.50}"
            )
        if self.precision not in _PRECISIONS:
            raise did_you_mean("precision", str(self.precision), _PRECISIONS)
        if self.patience is not None:
            object.__setattr__(self, "patience", whole("patience", self.patience, 1))
        if self.solved is not None:
            object.__setattr__(self, "solved", real("solved", self.solved, 0.0))
            if not self.solved < 1:
                raise InputError(f"solved is the accuracy above which a run ends, from 0 to below 1; got {self.solved}")
        object.__setattr__(self, "solved_for", whole("solved_for", self.solved_for, 0))
        if self.solved is None and self.solved_for != _SOLVED_FOR:
            raise InputError(f"solved_for={self.solved_for} says for how long a task is solved; give solved=0.99, too")
        object.__setattr__(self, "seed", seed_number(self.seed))
        object.__setattr__(self, "snapshots", checked_choice(self.snapshots))
        object.__setattr__(self, "snapshot_prompts", checked_prompts(self.snapshot_prompts))

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.to_json() if name in _SLOTS else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Settings":
        """Settings from plain values, as a TOML file holds them; an unknown name raises with the nearest."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise did_you_mean("setting", name, known)
        return cls(**values)

    def evaluation_steps(self, steps: int) -> set[int]:
        """After how many steps the held-out loss is measured: at equal distances, 0 and the end included."""
        return {round(steps * i / self.evaluate) for i in range(self.evaluate + 1)}

    def checkpoint_steps(self, steps: int) -> list[int]:
        """After how many steps a checkpoint is kept: at equal ratios, with 0 and the end.

        >>> Settings(checkpoints=4).checkpoint_steps(1000)
        [0, 1, 10, 100, 1000]
        """
        if steps < 1:
            return [0]
        return sorted({0, steps, *(round(float(step)) for step in np.geomspace(1, steps, self.checkpoints))})


def _is_positive(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf
