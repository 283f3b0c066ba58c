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
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.allocator import keep_freed_pages
from hooklens.core.arguments import check_call, whole
from hooklens.core.envelope import digest
from hooklens.core.errors import HooklensError, InputError, Unavailable
from hooklens.core.fingerprint import raw_bytes
from hooklens.core.progress_bar import progress
from hooklens.data.batches import Batch, TrainingData, drawn_for
from hooklens.model.dropout import dropout_masks
from hooklens.model.linear import GradientVector, faster_gradients_pay, gradients_into
from hooklens.model.shared_tokens import last_logits, shares_tokens
from hooklens.model.transformer import runs_as_defined
from hooklens.pretrained.checkpoint import save
from hooklens.training.divergence import Diverged, LossWatch, divergence_message
from hooklens.training.losses import correct
from hooklens.training.parameter_vector import ParameterVector
from hooklens.training.preconditions import (
    check_fit,
    check_trainable,
    held_out_batches,
    hooked_names,
    tokenizer_of_both,
)
from hooklens.training.processes import Processes, join_processes
from hooklens.training.recorder import Recorder, ends_early, recorded_evaluations
from hooklens.training.run_folder import RunFolder, plain_json
from hooklens.training.snapshots import SnapshotTaker, snapshot_prompts
from hooklens.training.tensorboard_log import TensorBoardLog
from hooklens.training.training_run import Run
from hooklens.training.training_settings import Settings

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_SAVE_EVERY = 30.0  # seconds between two states on disk: about what a killed run has to repeat
_SAVE_SHARE = 20  # times what writing a state takes: at least this long until the next, longer for a large model
_FLUSH_EVERY = 1.0  # seconds between two moments at which others see new rows
_UNENDED: list[Run] = []  # runs in temporary folders that an error ended: their folders stay until the process exits


def train(
    model: "HookedTransformer",
    data: TrainingData,
    *,
    steps: int,
    out: str | os.PathLike | None = None,
    settings: Settings | None = None,
    after_step: Callable[[int, float], Any] | None = None,
    show: bool | None = None,
    tensorboard: bool = False,
) -> Run:
    """Train a model in place, and record the run; a run that began in the folder `out` is resumed.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.data.modular import modular_arithmetic
    >>> data = modular_arithmetic(p=5, fraction=0.8)
    >>> run = train(tiny_model(d_vocab=data.d_vocab), data, steps=3, settings=Settings(batch=4))
    >>> run.steps_done, run.loss.shape
    (3, (3,))

    Without `out` the run lives in a temporary folder, which goes with the returned run and its checkpoints.
    `after_step(step, loss)` is called after every step. `tensorboard` also writes scalars for TensorBoard into the
    folder. The model is in evaluation mode afterwards. Hooks that are open act while it trains, and belong to the run.
    A model without a tokenizer takes that of the data, so that it and its checkpoints read text.

    A run that is killed and resumed on the same machine gives the same weights, bit for bit, as one that is not. A run
    with a constant schedule may be given more `steps`. Under torchrun each process takes its rows of the batch.

    Raises `Diverged` if the loss becomes NaN, infinite or far larger than at the start, and `InputError` if `out` holds
    another run, or model, data and settings do not fit each other.
    """
    settings = Settings() if settings is None else settings
    steps = whole("steps", steps, 1)
    check_trainable(model, data)
    if after_step is not None:
        check_call("after_step", after_step, "step", "loss")
    group = join_processes(model)
    batch = check_fit(model, data, settings, group)
    folder = RunFolder(Path(tempfile.mkdtemp(prefix="hooklens-run-")) if out is None else out)
    run = Run(folder.path)
    if out is None:
        weakref.finalize(run, shutil.rmtree, folder.path, ignore_errors=True)
    try:
        with folder.writing() if group.first else contextlib.nullcontext():
            training = _Training(model, data, settings, steps=steps, folder=folder, group=group)
            training.resume()
            model.tokenizer = tokenizer_of_both(model, data)
            with training.recording(batch, tensorboard):
                _run(training, after_step, show, again="the same call" if out is not None else f"out={str(run.path)!r}")
    except BaseException:
        if out is None and folder.exists:
            _UNENDED.append(run)
        raise
    finally:
        model.eval()
    return run


def _run(
    training: "_Training", after_step: Callable[[int, float], Any] | None, show: bool | None, *, again: str
) -> None:
    """Take the remaining steps; `again` says what goes on with a run that Ctrl-C stopped."""
    show = show if training.group.first else False
    with _delayed_interrupt() as interrupted, progress("training", training.steps, unit="steps", show=show) as advance:
        advance(training.step)
        over, stopped = training.group.any(training.is_over(), interrupted())
        while training.step < training.steps and not over and not stopped:
            loss = training.advance()
            advance(1, f"loss {loss:.4g}")
            if after_step is not None:
                after_step(training.step, loss)
                training.look_again()
            over, stopped = training.group.any(training.is_over(), interrupted())
        if over:
            training.keep_checkpoint()  # the last model of a run that stops early
        training.save_state()
        if stopped or interrupted():
            is_left = training.step < training.steps and not over
            following = f"{again} goes on from there" if is_left else "the run is complete"
            raise KeyboardInterrupt(f"stopped after {training.step} steps; {following}")


class _Training:
    """A run under way: everything that a step reads and changes."""

    def __init__(
        self, model: Any, data: TrainingData, settings: Settings, *, steps: int, folder: RunFolder, group: Processes
    ):
        self.model, self.data, self.steps, self.settings = model, data, steps, settings
        self.folder, self.group = folder, group
        self.vector = ParameterVector(model)
        self.spans = list(self.vector.slices.values())
        self.grads = self.vector.zeros()
        self.grad_views = self.vector.views(self.grads)
        self.slots = {name: self.vector.zeros() for name in settings.optimizer.kept}
        self.masks = torch.Generator(self.vector.values.device)
        self.evaluations = settings.evaluation_steps(steps)
        self.checkpoints = set(settings.checkpoint_steps(steps))
        self.step = self.n_positions = 0
        self.watch = LossWatch()
        self.recorder: Recorder | None = None
        self.taker: SnapshotTaker | None = None
        self.snapshot_shapes: dict[str, list[int]] = {}
        self.products = "torch"
        self.flushed = time.monotonic()
        self.save_at = self.flushed + _SAVE_EVERY
        keep_freed_pages()  # every step frees and needs again the memory of its activations and gradients
        self.as_defined: bool | None = None  # not looked at since the caller last had a turn
        self.digest = ""  # of what the run is, without its number of steps
        self.rows: dict[str, int] = {}  # in each file of the record, when the state was written

    # -- beginning and end

    def resume(self) -> None:
        """Take the run in the folder from its last state; write what the run is if it begins here."""
        if self.group.first:
            state = self.folder.load_state() if self.folder.exists else None
            self.products = self._fitting_products()
            identity = self._identity(state)
            self.folder.check(identity, why_not_extended=self._why_not_extended())
            self.digest = digest([plain_json(identity | {"steps": None})])
            message = self.folder.noted_divergence()
            if message is not None:
                raise Diverged(message)
            if state is not None:
                self._take(*state)
            self.taker, self.snapshot_shapes = self._snapshot_taker()
            self.folder.begin(identity)
            self.folder.forget_after(self.step if state is not None else -1)
        # Only the first process reads the folder, which the others need not see.
        step, onednn = self.group.numbers_of_first([float(self.step), float(self.products == "oneDNN")])
        self.step, self.products = int(step), "oneDNN" if onednn else "torch"
        self.group.copy_first(self.vector.values, *self.slots.values())
        self._share_losses()

    def _share_losses(self) -> None:
        watch = self.watch
        numbers = [float(len(watch.last)), float(watch.first is not None), watch.first or 0.0]
        n_last, known, first = self.group.numbers_of_first(numbers)
        last = watch.last if self.group.first else [0.0] * int(n_last)
        self.watch = LossWatch(first if known else None, self.group.numbers_of_first(last))

    def _take(self, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        here = {"values": self.vector.values, **self.slots}
        same = {name: (t.shape, t.dtype) for name, t in here.items()} == {
            name: (t.shape, t.dtype) for name, t in tensors.items()
        }
        if not same or content.get("run", self.digest) != self.digest:
            raise self.folder.foreign_state()
        self.step, self.watch = content["step"], LossWatch(**content["losses"])
        self.rows = content.get("rows", {})
        for name, tensor in here.items():
            tensor.copy_(tensors[name])

    def _why_not_extended(self) -> str | None:
        """Why a run of fewer steps cannot go on; None if it can."""
        schedule = self.settings.schedule
        if not schedule.depends_on_steps:
            return None
        return f"the {schedule.name} schedule depends on the planned steps; only a constant one can be extended"

    def _fitting_products(self) -> str:
        """The products of this run. The two differ in the last bits: a run goes on with those that it began with."""
        fitting = "oneDNN" if self.vector.values.dtype == torch.float32 and faster_gradients_pay() else "torch"
        return self.folder.identity().get("products", fitting) if self.folder.exists else fitting

    def _identity(self, state: tuple[dict[str, Any], dict[str, Tensor]] | None) -> dict[str, Any]:
        """What two calls that are the same run have in common. Weights: those at its start, or of its last state."""
        values = self.vector.values.cpu()
        initial = digest([raw_bytes(values)])
        if state is not None and values.dtype == state[1]["values"].dtype and torch.equal(values, state[1]["values"]):
            initial = self.folder.identity()["initial_weights"]
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        hooked = hooked_names(self.model)
        return ({"hooked": hooked} if hooked else {}) | {
            "steps": self.steps,
            "settings": self.settings.to_json(),
            "config": self.model.cfg.to_json(),
            "data": self.data.identity(),
            "to_learn": self.data.description(),
            "products": self.products,
            "layers": list(self.vector.layers),
            "trained": sum(p.numel() for p in self.vector.parameters.values()),
            "frozen_weights": digest(raw_bytes(p.detach().cpu().contiguous()) for p in frozen),
            "initial_weights": initial,
        }

    def _snapshot_taker(self) -> tuple[SnapshotTaker | None, dict[str, list[int]]]:
        if not self.settings.snapshots:
            return None, {}
        prompts = snapshot_prompts(self.model, self.data, self.settings.snapshot_prompts)
        taker = SnapshotTaker(self.model, self.settings.snapshots, prompts)
        return taker, taker.check_size(len(self.evaluations))

    @contextlib.contextmanager
    def recording(self, batch: Batch, tensorboard: bool) -> Iterator[None]:
        """Record while the block runs; a run at its start evaluates the untrained model first."""
        if not self.group.first:
            yield
            return
        board = TensorBoardLog(self.folder.path, list(self.vector.layers), self.step) if tensorboard else None
        n_positions = self.n_positions = max(batch.counts.shape[1], self.data.n_positions)  # rows may grow later
        layers = list(self.vector.layers)
        self.recorder = Recorder(self.folder.path, layers, n_positions, keep=self.step, rows=self.rows)
        self.recorder.tensorboard = board
        try:
            if self.taker is not None:
                self.recorder.take_snapshots(self.taker, self.snapshot_shapes)
            if self.step == 0:
                self._after_step()
            yield
        except HooklensError as error:
            if self.folder.exists:
                raise
            raise Unavailable(
                f"the folder {str(self.folder.path)!r} vanished while its run was written ({error}). The model holds "
                f"the weights after {self.step} steps: hl.save(model, path) keeps them"
            ) from error
        finally:
            self.recorder.close()

    # -- one step

    def advance(self) -> float:
        """One step: gradient, clipping, the optimiser's change, the record. Returns the loss."""
        began = time.monotonic()
        loss, accuracy = self._gradient()
        gradient_norms = self.vector.norms(self.grads)
        gradient = float(gradient_norms.norm())
        fault = self.watch.fault(self.step, loss, gradient)
        if fault is not None:
            self._diverged(fault, gradient_norms)
        if self.settings.clip is not None and gradient > self.settings.clip:
            self.grads.mul_(self.settings.clip / gradient)
        rate = self.settings.optimizer.lr * self.settings.schedule.factor(self.step, self.steps)
        norms = self.settings.optimizer.step(
            self.vector.values,
            self.grads,
            self.slots,
            t=self.step + 1,
            rate=rate,
            spans=self.spans,
            layers=list(self.vector.layers.values()),
        )
        if self.recorder is not None:
            norms = torch.cat([gradient_norms[None], norms]).float().cpu()
            self.recorder.step(self.step, [loss, accuracy, rate, gradient, time.monotonic() - began], norms)
        self.step += 1
        self._after_step()
        return loss

    def _gradient(self) -> tuple[float, float]:
        """Fill the gradient of the mean loss over the whole batch, of all processes; returns it and the accuracy."""
        batch = self.data.batch(self.step, self.settings.batch)
        total = int(batch.counts.sum())
        n_rows, first_row = len(batch), self.group.first_row(len(batch))
        rows = self.group.rows(batch).to(self.vector.values.device, self.vector.values.dtype)
        self.model.train()
        self.vector.clear_gradients()
        size = -(-len(rows) // self.settings.accumulate)
        seed = drawn_for(self.settings.seed, f"dropout {self.step}").initial_seed()
        summed = torch.zeros(2, dtype=torch.float64, device=self.vector.values.device)
        into = self._into()
        for start in range(0, len(rows), size):
            # Every pass draws the masks of the whole batch again, from the seed and the step only.
            self.masks.manual_seed(seed)
            masks = dropout_masks(self.masks, first_row=first_row + start, n_rows=n_rows)
            with torch.enable_grad(), masks, gradients_into(into):
                losses, n_correct = self._losses_of(rows.rows(start, start + size))
                part = losses.sum() / total
                part.backward()
            into.add_rows()
            summed += torch.stack([part.detach(), n_correct / total])
        self.vector.gather_gradients(self.grads, into.written)
        self.group.sum(self.grads)
        loss, accuracy = self.group.sum(summed).tolist()
        return loss, accuracy

    def _into(self) -> GradientVector:
        of = {id(self.vector.parameters[name]): view for name, view in self.grad_views.items()}
        on_cpu = self.vector.values.device.type == "cpu"  # on a GPU the order in which rows are added is not fixed
        return GradientVector(of, products=self.products == "oneDNN", rows=on_cpu)

    def _losses_of(self, batch: Batch) -> tuple[Float[Tensor, "target"], Float[Tensor, ""]]:
        """The loss of every target that counts, and the number of those that have the largest output."""
        asked = self._only_position(batch)
        output, targets = self._output(batch, asked), batch.targets
        if asked is not None:
            targets = targets[:, [asked]]
        elif not bool(batch.counts.all()):
            output, targets = output[batch.counts], targets[batch.counts]
        return self.settings.loss(output, targets).flatten(), correct(output.detach(), targets).sum()

    def _only_position(self, batch: Batch) -> int | None:
        """The position of all targets that count, if it is one and nobody sees what the others compute."""
        counts = batch.counts[0]
        if int(counts.sum()) != 1 or not bool((batch.counts == counts).all()) or self.settings.precision != "model":
            return None
        return None if hooked_names(self.model) else int(counts.nonzero())

    def _output(self, batch: Batch, asked: int | None) -> Float[Tensor, "row pos d_vocab"]:
        """The model's output. Under autocast logits are computed in float32 from the stream, as bfloat16 has 8 bits."""
        if self.settings.precision == "model":
            is_last = asked == batch.inputs.shape[1] - 1
            if is_last and shares_tokens(self.model, batch.inputs) and self._runs_as_defined():
                return last_logits(self.model, batch.inputs)
            return self.model(batch.inputs, logits_at=asked)
        with torch.autocast(self.vector.values.device.type, dtype=torch.bfloat16):
            stream = self.model(batch.inputs, stop_at_layer=self.model.cfg.n_layers)
        return self.model.read_out(stream.float())

    def _runs_as_defined(self) -> bool:
        if self.as_defined is None:
            self.as_defined = runs_as_defined(self.model)
        return self.as_defined

    def _diverged(self, fault: str, norms: Float[Tensor, "layer"] | None = None) -> NoReturn:
        """Stop the run, drop checkpoints from this step on, and note for the next call what happened."""
        finite = self.vector.norms(self.vector.values) if norms is None else norms
        layers = [name for name, norm in zip(self.vector.layers, finite.isfinite().tolist(), strict=True) if not norm]
        if not self.group.first:
            raise Diverged(divergence_message(fault, layers, "in the first process"))
        self.folder.forget_after(self.step - 1)
        kept = self.folder.checkpoint_steps()
        message = divergence_message(fault, layers, str(self.folder.checkpoint(kept[-1])) if kept else "none")
        self.folder.note_divergence(message, self.step)
        raise Diverged(message)

    # -- between steps

    def _after_step(self) -> None:
        """Evaluation, checkpoint and state, where they are due after this many steps."""
        if self.recorder is None:
            return
        if self.step in self.evaluations:
            parts = list(self._held_out_losses())
            losses, is_correct = map(torch.cat, zip(*parts, strict=True)) if parts else (None, None)
            self.recorder.evaluation(self.step, losses, is_correct)
        if self.step in self.checkpoints:
            self.keep_checkpoint()
        now = time.monotonic()
        if now - self.flushed > _FLUSH_EVERY:
            self.recorder.flush()
            self.flushed = now
        if now > self.save_at:
            self.save_state()

    def look_again(self) -> None:
        """See what the caller changed. Raise if a parameter has other memory: training would not reach it."""
        self.as_defined = None
        name = self.vector.replaced()
        if name is not None:
            raise InputError(
                f"after step {self.step}, {name} is no longer the parameter that is trained: it was replaced, moved, "
                "cast or frozen. Change weights in place, as in weight.data.clamp_(-1, 1); freeze them before training"
            )

    def keep_checkpoint(self) -> None:
        """Write the model as it is, unless its weights are no numbers: then the run has diverged."""
        if self.recorder is None or self.folder.checkpoint(self.step).is_file():
            return
        if not bool(self.vector.norms(self.vector.values).isfinite().all()):
            self._diverged(f"the weights after {self.step} steps are not finite")
        save(self.model, self.folder.checkpoint(self.step))

    def _held_out_losses(self) -> Iterator[tuple[Float[Tensor, "row pos"], Float[Tensor, "row pos"]]]:
        """Of every held-out target the loss, and 1 if it has the largest output, else 0; NaN where none counts."""
        self.model.eval()
        values = self.vector.values
        for batch in held_out_batches(self.data, self.settings.batch):
            batch = batch.to(values.device, values.dtype)
            asked = self._only_position(batch)
            with torch.no_grad():
                output = self._output(batch, asked)
                targets = batch.targets if asked is None else batch.targets[:, [asked]]
                of_targets = torch.stack([self.settings.loss(output, targets), correct(output, targets)])
            rows = torch.full((2, *batch.counts.shape), float("nan"), dtype=torch.float32, device=values.device)
            rows[:, :, slice(None) if asked is None else [asked]] = of_targets.float()
            if not bool(rows[0][batch.counts].isfinite().all()):
                self._diverged(f"the held-out loss after {self.step} steps is not finite")
            losses, is_correct = rows.masked_fill(~batch.counts, float("nan")).cpu()
            yield _filled(losses, self.n_positions), _filled(is_correct, self.n_positions)

    def is_over(self) -> bool:
        """Whether the held-out loss has not fallen for `patience` evaluations, or the task is solved.

        The first process knows.
        """
        can_end = self.settings.patience is not None or self.settings.solved is not None
        if self.recorder is None or self.step not in self.evaluations or not can_end:
            return False
        return ends_early(recorded_evaluations(self.folder.path), self.settings.to_json())

    def save_state(self) -> None:
        """Write what the run resumes from, behind the rows that it belongs to."""
        if self.recorder is None:
            return
        began = time.monotonic()
        self.recorder.flush(to_disk=True)
        content = {"step": self.step, "losses": self.watch.to_json(), "run": self.digest, "rows": self.recorder.rows()}
        self.folder.save_state(content, {"values": self.vector.values, **self.slots})
        now = time.monotonic()
        self.save_at = now + max(_SAVE_EVERY, _SAVE_SHARE * (now - began))


def _filled(losses: Float[Tensor, "row pos"], n_positions: int) -> Float[Tensor, "row all_pos"]:
    """Losses of the width of the longest rows: NaN where shorter ones end."""
    return torch.nn.functional.pad(losses, (0, n_positions - losses.shape[1]), value=float("nan"))


@contextlib.contextmanager
def _delayed_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the step under way finish when Ctrl-C arrives; a second one stops at once."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: bool(seen)
        return
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None):  # a process in the background, or a handler that Python did not set
        yield lambda: False
        return

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
