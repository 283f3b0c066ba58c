"""The folder of a run: what identifies it, what it recorded, its checkpoints, and the state that it resumes from."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hooklens.core.arguments import path_of
from hooklens.core.envelope import Schema, read_envelope, write_envelope
from hooklens.core.errors import InputError, Unavailable
from hooklens.core.files import make_folder

RUN = Schema("hooklens.run", 1, "a run", "hl.train", as_json=True)
STATE = Schema("hooklens.training_state", 1, "the state of a run", "hl.train")
_LOCK = ".lock"
RECIPE = "settings.toml"  # what `hooklens train` repeats the run from; see `run_recipe`
_CHECKPOINT = "step_{:09d}.safetensors"


class RunFolder:
    """The files of one run, and which process writes them.

    `run.json` says what the run is; `steps.rows` and `evaluations.rows` grow as it goes; `checkpoints/` holds models
    that `hl.load` reads; `state.safetensors` is what the run resumes from.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path_of(path, "out")

    @property
    def exists(self) -> bool:
        """Whether a run began here."""
        return (self.path / "run.json").is_file()

    def identity(self) -> dict[str, Any]:
        """What the run is: its settings, configuration, data and number of steps."""
        return read_envelope(self.path / "run.json", RUN).content

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Write what the run is, or compare it with what began here before."""
        if not self.exists:
            if self.path.is_dir() and any(file.name not in (_LOCK, RECIPE) for file in self.path.iterdir()):
                raise InputError(f"out={str(self.path)!r} holds other files; give a new folder, or that of a run")
            make_folder(self.path / "checkpoints")
            write_envelope(self.path / "run.json", RUN, dict(identity))
            return
        differences = list(_differences(self.identity(), identity))
        if differences:
            raise InputError(
                f"{str(self.path)!r} holds another run: {'; '.join(differences[:3])}; give another folder for out=, or "
                "train with what that run began with"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run for this process; another process that holds it raises."""
        make_folder(self.path)
        handle = open(self.path / _LOCK, "a+")  # noqa: SIM115  # closed below: the lock lasts as long as the handle
        try:
            _lock(handle, self.path)
            yield
        finally:
            handle.close()

    def is_being_written(self) -> bool | None:
        """Whether a process trains this run now; None where the system cannot tell."""
        try:
            import fcntl
        except ImportError:
            return None
        if not (self.path / _LOCK).is_file():
            return False
        with open(self.path / _LOCK) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # held for an instant
            except OSError:
                return True
        return False

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after that many steps lies."""
        return self.path / "checkpoints" / _CHECKPOINT.format(step)

    def checkpoint_steps(self) -> list[int]:
        """The steps after which checkpoints were kept."""
        names = (path.stem.removeprefix("step_") for path in (self.path / "checkpoints").glob("step_*.safetensors"))
        return sorted(int(name) for name in names if name.isdecimal())

    def forget_after(self, step: int) -> None:
        """Remove checkpoints of later steps: the run will write them again."""
        for later in self.checkpoint_steps():
            if later > step:
                self.checkpoint(later).unlink()

    def save_state(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write what the run resumes from; the previous state stays until this one is complete."""
        write_envelope(self.path / "state.safetensors", STATE, dict(content), tensors)

    def load_state(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The numbers and the tensors to resume from; None if the run was stopped before the first state."""
        path = self.path / "state.safetensors"
        if not path.is_file():
            return None
        envelope = read_envelope(path, STATE)
        return envelope.content, dict(envelope.tensors())


def _lock(handle: Any, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: runs are not guarded there
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        owner = handle.read().strip() or "another process"
        raise Unavailable(
            f"{str(path)!r} is being written by {owner}; wait until it ends, stop it, or give another folder for out="
        ) from error
    handle.truncate(0)
    handle.write(f"process {os.getpid()}")
    handle.flush()


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Where two nested dicts of plain values differ, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return
    before, now = (list(value) if isinstance(value, tuple) else value for value in (before, now))
    if before != now:
        yield f"{name} was {before!r:.60} and is {now!r:.60}"
