"""Training: one loop over any model that maps a batch's inputs to outputs."""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.envelope import digest
from hooklens.core.errors import HooklensError
from hooklens.core.progress_bar import progress
from hooklens.data.batches import Batch, TrainingData
from hooklens.pretrained.checkpoint import save
from hooklens.training.parameter_vector import ParameterVector
from hooklens.training.processes import Processes, processes
from hooklens.training.recorder import Recorder, recorded_evaluations
from hooklens.training.run_folder import RunFolder
from hooklens.training.training_run import Run
from hooklens.training.training_settings import Settings

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_SAVE_EVERY = 30.0  # seconds between two states on disk: about what a killed run has to repeat
_FLUSH_EVERY = 1.0  # seconds between two moments at which others see new rows
_DIVERGED = 3.0  # times the first loss, as the mean of the last steps
_WINDOW = 20  # steps of that mean


class Diverged(HooklensError, ArithmeticError):
    """The loss became NaN, infinite or far larger than at the start."""


def train(
    model: "HookedTransformer",
    data: TrainingData,
    *,
    steps: int,
    out: str | os.PathLike | None = None,
    settings: Settings | None = None,
    after_step: Callable[[int, float], Any] | None = None,
    show: bool | None = None,
) -> Run:
    """Train a model in place, and record the run; a run that began in the folder `out` is resumed.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.data.modular import modular_arithmetic
    >>> data = modular_arithmetic(p=5, fraction=0.8)
    >>> run = train(tiny_model(d_vocab=data.d_vocab), data, steps=3, settings=Settings(batch=4))
    >>> run.steps_done, run.loss.shape
    (3, (3,))

    Without `out` the run lives in a temporary folder. `after_step(step, loss)` is called after every step. A run that
    is killed and resumed gives the same weights, bit for bit, as one that is not.
    """
    settings = Settings() if settings is None else settings
    whole("steps", steps, 1)
    folder = RunFolder(Path(tempfile.mkdtemp(prefix="hooklens-run-")) if out is None else out)
    group = processes(model.device)
    with folder.writing() if group.first else contextlib.nullcontext():
        training = _Training(model, data, steps, settings, folder, group)
        training.resume()
        with training.recording(), _delayed_interrupt() as interrupted:
            with progress("training", steps, unit="steps", show=show if group.first else False) as advance:
                advance(training.step)
                while training.step < steps and not training.is_over():
                    loss = training.advance()
                    advance()
                    if after_step is not None:
                        after_step(training.step, loss)
                    if interrupted():
                        training.save_state()
                        raise KeyboardInterrupt(
                            f"stopped after {training.step} steps; the same call goes on from there"
                        )
            training.save_state()
    model.eval()
    run = Run(folder.path)
    if out is None:
        weakref.finalize(run, shutil.rmtree, folder.path, ignore_errors=True)
    return run


class _Training:
    """A run under way: everything that a step reads and changes."""

    def __init__(
        self, model: Any, data: TrainingData, steps: int, settings: Settings, folder: RunFolder, group: Processes
    ):
        self.model, self.data, self.steps, self.settings = model, data, steps, settings
        self.folder, self.group = folder, group
        self.vector = ParameterVector(model)
        self.grads = torch.zeros_like(self.vector.values)
        self.slots = {name: torch.zeros_like(self.vector.values) for name in settings.optimizer.kept}
        self.evaluations = settings.evaluation_steps(steps)
        self.checkpoints = set(settings.checkpoint_steps(steps))
        self.spans = list(self.vector.slices.values())
        self.step = 0
        self.first_loss: float | None = None
        self.last_losses: list[float] = []
        self.recorder: Recorder | None = None
        self.saved = self.flushed = time.monotonic()

    def resume(self) -> None:
        """Take the run in the folder from its last state; write what the run is if it begins here."""
        state = self.folder.load_state() if self.folder.exists else None
        if self.group.first:
            self.folder.begin(self._identity(state))
        self.group.wait()
        if state is None:
            return
        content, tensors = state
        self.step, self.first_loss = content["step"], content["first_loss"]
        self.vector.values.copy_(tensors["values"])
        for name, slot in self.slots.items():
            slot.copy_(tensors[name])
        if self.group.first:
            self.folder.forget_after(self.step)

    def _identity(self, state: tuple[dict[str, Any], dict[str, Tensor]] | None) -> dict[str, Any]:
        """What two calls that are the same run have in common. Weights: those at its start, or of its last state."""
        now = digest([self.vector.values.cpu().view(torch.uint8).numpy().data])
        if state is not None and torch.equal(self.vector.values.cpu(), state[1]["values"]):
            now = self.folder.identity()["initial_weights"]
        return {
            "steps": self.steps,
            "settings": self.settings.to_json(),
            "config": self.model.cfg.to_json(),
            "data": self.data.identity(),
            "to_learn": self.data.description(),
            "layers": list(self.vector.layers),
            "initial_weights": now,
        }

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record while the block runs; a run at its start evaluates the untrained model first."""
        if not self.group.first:
            yield
            return
        n_positions = self.data.batch(0, self.settings.batch).counts.shape[1]
        self.recorder = Recorder(self.folder.path, list(self.vector.layers), n_positions, keep=self.step)
        try:
            if self.step == 0:
                self._after_step()
            yield
        finally:
            self.recorder.close()

    # -- one step

    def advance(self) -> float:
        """One step: gradient, clipping, the optimiser's change, the record. Returns the loss."""
        began = time.monotonic()
        loss = self._gradient()
        gradient_norms = self.vector.norms(self.grads)
        gradient = float(gradient_norms.norm())
        self._check(loss, gradient, gradient_norms)
        if self.settings.clip is not None and gradient > self.settings.clip:
            self.grads.mul_(self.settings.clip / gradient)
        parameter_norms = self.vector.norms(self.vector.values)
        rate = self.settings.optimizer.lr * self.settings.schedule.factor(self.step, self.steps)
        self.settings.optimizer.step(
            self.vector.values,
            self.grads,
            self.slots,
            t=self.step + 1,
            rate=rate,
            spans=list(self.vector.slices.values()),
        )
        change_norms = self.vector.norms(self.grads)
        if self.recorder is not None:
            norms = torch.stack([gradient_norms, parameter_norms, change_norms]).float().cpu()
            self.recorder.step(self.step, [loss, rate, gradient, time.monotonic() - began], norms)
        self.step += 1
        self._after_step()
        return loss

    def _gradient(self) -> float:
        """Fill the gradient of the mean loss over the whole batch, of all processes; returns that loss."""
        batch = self.data.batch(self.step, self.settings.batch)
        total = int(batch.counts.sum())
        rows = self.group.rows(batch).to(self.vector.values.device, self.vector.values.dtype)
        self.model.train()
        size = -(-len(rows) // self.settings.accumulate)
        summed = torch.zeros((), dtype=torch.float64, device=self.vector.values.device)
        for start in range(0, len(rows), size):
            losses = self._losses_of(rows.rows(start, start + size))
            part = losses.sum() / total
            part.backward()
            summed += part.detach()
        self.vector.gather_gradients(self.grads)
        self.group.sum(self.grads)
        return float(self.group.sum(summed))

    def _losses_of(self, batch: Batch) -> Float[Tensor, "target"]:
        with self._autocast():
            output = self.model(batch.inputs)
        return self.settings.loss(output[batch.counts], batch.targets[batch.counts])

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.settings.precision == "model":
            return contextlib.nullcontext()
        return torch.autocast(self.vector.values.device.type, dtype=torch.bfloat16)

    def _check(self, loss: float, gradient: float, norms: Tensor) -> None:
        """Stop where the loss or the gradient is no finite number, or the loss has grown far beyond its start."""
        self.last_losses = [*self.last_losses[-_WINDOW + 1 :], loss]
        first = self.first_loss = loss if self.first_loss is None else self.first_loss
        mean = sum(self.last_losses) / len(self.last_losses)
        grown = len(self.last_losses) == _WINDOW and mean > _DIVERGED * abs(first) + 1
        if not grown and loss == loss and abs(loss) != float("inf") and gradient < float("inf"):
            return
        bad = [name for name, norm in zip(self.vector.layers, norms.tolist(), strict=True) if not norm < float("inf")]
        where = f"; the gradient is not finite in {', '.join(bad[:4])}" if bad else ""
        kept = self.folder.checkpoint_steps() if self.group.first else []
        raise Diverged(
            f"training diverged in step {self.step}: the loss is {loss:.4g} (first {first:.4g}){where}; a lower "
            f"learning rate, warm-up or clip= may help. The last checkpoint before it: "
            f"{self.folder.checkpoint(kept[-1]) if kept else 'none'}"
        )

    # -- between steps

    def _after_step(self) -> None:
        """Evaluation, checkpoint and state, where they are due after this many steps."""
        if self.recorder is None:
            return
        if self.step in self.evaluations:
            losses = list(self._held_out_losses())
            if losses:
                self.recorder.evaluation(self.step, torch.cat(losses))
        if self.step in self.checkpoints:
            save(self.model, self.folder.checkpoint(self.step))
        now = time.monotonic()
        if now - self.flushed > _FLUSH_EVERY:
            self.recorder.flush()
            self.flushed = now
        if now - self.saved > _SAVE_EVERY:
            self.save_state()

    def _held_out_losses(self) -> Iterator[Float[Tensor, "row pos"]]:
        """The loss of every held-out target, NaN where none counts."""
        self.model.eval()
        values = self.vector.values
        for batch in self.data.held_out(self.settings.batch):
            batch = batch.to(values.device, values.dtype)
            with torch.no_grad(), self._autocast():
                losses = self.settings.loss(self.model(batch.inputs), batch.targets)
            yield losses.masked_fill(~batch.counts, float("nan")).float().cpu()

    def is_over(self) -> bool:
        """Whether the held-out loss has not fallen for `patience` evaluations."""
        if self.settings.patience is None or self.step not in self.evaluations:
            return False
        losses = recorded_evaluations(self.folder.path)["loss"]
        best = int(losses.argmin())
        return len(losses) - 1 - best >= self.settings.patience

    def save_state(self) -> None:
        """Write what the run resumes from, behind the rows that it belongs to."""
        if self.recorder is None:
            return
        self.recorder.flush(to_disk=True)
        content = {"step": self.step, "first_loss": self.first_loss}
        self.folder.save_state(content, {"values": self.vector.values, **self.slots})
        self.saved = time.monotonic()


@contextlib.contextmanager
def _delayed_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the step under way finish when Ctrl-C arrives; a second one stops at once."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: bool(seen)
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
