"""Training: one loop over any model, its optimisers, schedules and losses, and runs that survive anything."""

# All modules are imported here, so that a name shared by a module and its function always means the function.
from hooklens.training.divergence import Diverged
from hooklens.training.likelihood import Likelihood, measure_likelihood
from hooklens.training.loop import train
from hooklens.training.losses import CrossEntropy, Loss, SquaredError, StableMax
from hooklens.training.optimizers import SGD, Adam, AdamW, Grokfast, Optimizer, OrthogonalGradient
from hooklens.training.schedules import Constant, Cosine, Schedule, Steps
from hooklens.training.snapshots import Snapshots
from hooklens.training.training_run import Checkpoint, Run, checkpoints, open_run
from hooklens.training.training_settings import Settings

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Checkpoint",
    "Constant",
    "Cosine",
    "CrossEntropy",
    "Diverged",
    "Grokfast",
    "Likelihood",
    "Loss",
    "Optimizer",
    "OrthogonalGradient",
    "Run",
    "Schedule",
    "Settings",
    "Snapshots",
    "SquaredError",
    "StableMax",
    "Steps",
    "checkpoints",
    "measure_likelihood",
    "open_run",
    "train",
]
