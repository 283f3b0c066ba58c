"""The record of a run for TensorBoard, beside the run's own files."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import Unavailable

_KINDS = ("gradient_norm", "parameter_norm", "change_norm")


class TensorBoardLog:
    """Scalars of every step in `tensorboard/` of the run's folder; `tensorboard --logdir` shows them."""

    def __init__(self, folder: Path, layers: Sequence[str], first_step: int):
        self._writer = _summary_writer()(str(folder / "tensorboard"), purge_step=first_step)
        self._layers = layers

    def step(self, step: int, scalars: Sequence[float], norms: Float[Tensor, "kind layer"]) -> None:
        """Log loss, accuracy, learning rate, gradient norm and the norms of every layer."""
        for name, value in zip(("loss", "accuracy", "rate", "gradient"), scalars[:4], strict=True):
            if not math.isnan(value):  # targets that are vectors have no accuracy
                self._writer.add_scalar(f"train/{name}", value, step)
        for kind, of_layers in zip(_KINDS, norms.tolist(), strict=True):
            for layer, norm in zip(self._layers, of_layers, strict=True):
                self._writer.add_scalar(f"{kind}/{layer}", norm, step)

    def evaluation(self, step: int, loss: float, accuracy: float) -> None:
        """Log the held-out loss and accuracy after `step` steps."""
        self._writer.add_scalar("held_out/loss", loss, step)
        if not math.isnan(accuracy):
            self._writer.add_scalar("held_out/accuracy", accuracy, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise Unavailable(
            "tensorboard=True needs the package tensorboard; install it with `pip install 'hooklens[tensorboard]'`"
        ) from error
    return SummaryWriter
