"""Run the training of a tuned lens from its beginning, or from its file, to its end."""

import time
from pathlib import Path

import torch
from torch import Tensor

from hooklens.core.envelope import read_envelope, write_envelope
from hooklens.core.errors import FileRefused
from hooklens.core.files import reading
from hooklens.core.fingerprint import identity
from hooklens.core.progress_bar import progress
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.lens.reading import check_quiet
from hooklens.plugins.lens.training import Schedule, State, advanced, begin, constant_kl, gradients, window_kl
from hooklens.plugins.lens.translators import LENS_SCHEMA, TunedLens

_SECONDS_BETWEEN_FILES = 60.0


def train(
    model: HookedTransformer, schedule: Schedule, held_out: Tensor, start: TunedLens | None, path: Path | None
) -> tuple[State, dict[str, Tensor]]:
    """Run all remaining steps and keep the file up to date; Ctrl-C writes the last complete step."""
    check_quiet(model)
    key = "" if path is None else run_key(model, schedule, held_out, start)
    if path is not None and path.exists():
        state, held = read_state(path, key, model.device)
    else:
        state = begin(model, schedule.train, start)
        held = {"before": window_kl(model, held_out), "constant": constant_kl(model, schedule.train, held_out)}
    written = time.monotonic()
    with progress("tuned lens", schedule.steps, unit="steps") as advance:
        advance(state.step)
        try:
            while state.step < schedule.steps:
                grads, loss = gradients(model, state, schedule.windows(state.step))
                state = advanced(state, grads, loss, schedule.rate(state.step))
                advance()
                if path is not None and time.monotonic() - written > _SECONDS_BETWEEN_FILES:
                    save_state(path, state, held, key)
                    written = time.monotonic()
        except KeyboardInterrupt:
            if path is not None:
                save_state(path, state, held, key)
            raise
    if path is not None:
        save_state(path, state, held, key)
    return state, held


def run_key(model: HookedTransformer, schedule: Schedule, held_out: Tensor, start: TunedLens | None) -> str:
    """A hash of everything that a run must share with its continuation."""
    fixed = (schedule.train, held_out, schedule.steps, schedule.lr, schedule.seed, schedule.batch)
    return identity((model.cfg.to_json(), dict(model.state_dict()), fixed, start), "the run")


def save_state(path: Path, state: State, held: dict[str, Tensor], key: str) -> None:
    """Save the current lens and the state needed to continue."""
    lens = state.lens()
    tensors = {"weight": lens.weight, "bias": lens.bias, "loss": state.loss, "size": state.size, **held}
    tensors |= {"maps": state.maps, "first": state.first, "second": state.second}
    write_envelope(path, LENS_SCHEMA, key, tensors)


def read_state(path: Path, key: str, device: torch.device) -> tuple[State, dict[str, Tensor]]:
    """Where a run stands; the file of another run is refused."""
    file = read_envelope(path, LENS_SCHEMA)
    if file.content != key:
        raise FileRefused(
            f"{path} contains a tuned lens of another run (other weights, tokens, start, steps, lr, seed or batch), or "
            "one without a run; give another path=, or read it with TunedLens.load"
        )
    on = {name: tensor.to(device) for name, tensor in file.tensors()}
    with reading(path, "a tuned lens in training"):
        state = State(*(on[name] for name in ("maps", "first", "second", "size", "loss")))
        return state, {name: on[name] for name in ("before", "constant")}
