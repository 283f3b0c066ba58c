"""The folder of a run: what identifies it, what it recorded, its checkpoints, and the state that it resumes from."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from numbers import Number
from pathlib import Path
from typing import Any

from torch import Tensor

from hooklens.core.arguments import path_of
from hooklens.core.envelope import Schema, read_envelope, write_envelope
from hooklens.core.errors import FileRefused, InputError, Unavailable, WrongType
from hooklens.core.files import make_folder

RUN = Schema("hooklens.run", 1, "a run", "hl.train", as_json=True)
DIVERGED = Schema("hooklens.diverged_run", 1, "where a run diverged", "hl.train", as_json=True)
STATE = Schema("hooklens.training_state", 1, "the state of a run", "hl.train")
_LOCK, _UNFINISHED = ".lock", ".hooklens-"
RECIPE = "settings.toml"  # what `hooklens train` repeats the run from; see `run_recipe`
_CHECKPOINT = "step_{:09d}.safetensors"
_AGAIN = "the run starts again from its first step"
_ATTEMPTS, _WAIT = 5, 0.05  # to get the lock, and seconds between two of them
#: What it means that one of these digests differs.
_DIGESTS = {
    "initial_weights": "the model's weights are neither those that the run began with nor those of its last state; "
    "build the model again as for the first call (same seed)",
    "frozen_weights": "the weights that are not trained are not those of the run",
    "data.tokens": "the text, or its tokenizer, was changed since the run began",
}


class RunFolder:
    """The files of one run, and which process writes them.

    `run.json` says what the run is; `steps.rows` and `evaluations.rows` grow as it goes; `checkpoints/` holds models
    that `hl.load` reads; `state.safetensors` is what the run resumes from; `diverged.json` says where it diverged.
    """

    def __init__(self, path: str | os.PathLike):
        # Absolute, so that the run is found after a change of the current folder.
        self.path = Path(os.path.abspath(path_of(path, "out").expanduser()))

    @property
    def exists(self) -> bool:
        """Whether a run began here."""
        return os.path.isfile(self.path / "run.json")  # False also for a name that no file can have

    def identity(self) -> dict[str, Any]:
        """What the run is: its settings, configuration, data and number of steps."""
        return read_envelope(self.path / "run.json", RUN).content

    def check(self, identity: Mapping[str, Any], *, why_not_extended: str | None = None) -> None:
        """Raise if other files or another run are here. More steps are refused with the reason `why_not_extended`."""
        if not self.exists:
            self.check_free()
            return
        before, now = self.identity(), _plain(identity)
        more_steps = now["steps"] > before["steps"]
        if more_steps and why_not_extended is None:
            before = before | {"steps": now["steps"]}
        if unlike := list(differences(before, now)):
            why = f" ({why_not_extended})" if more_steps and why_not_extended is not None else ""
            raise InputError(
                f"{str(self.path)!r} holds another run: {'; '.join(unlike[:3])}{why}; give another folder for "
                "out=, or train with what that run began with"
            )

    def check_free(self) -> None:
        """Raise if the folder holds what no run left there."""
        ours = (_LOCK, _UNFINISHED, RECIPE)
        if not os.path.isdir(self.path):
            return
        others = sorted(file.name for file in self.path.iterdir() if not file.name.startswith(ours))
        if others:
            shown = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
            raise InputError(
                f"out={str(self.path)!r} holds other files ({shown}) and no run; give a new folder, or that of a run"
            )

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Write what the run is, unless that is what stands here."""
        # run.json comes first: a folder without it that a killed process left is empty, and can be used again.
        if not self.exists or self.identity() != _plain(identity):
            write_envelope(self.path / "run.json", RUN, _plain(identity))
        make_folder(self.path / "checkpoints")

    def note_divergence(self, message: str, step: int) -> None:
        """Write that the run diverged, so that the next call says so at once."""
        write_envelope(self.path / "diverged.json", DIVERGED, {"message": message, "step": step})

    def noted_divergence(self) -> str | None:
        """The message of a run that diverged."""
        path = self.path / "diverged.json"
        return read_envelope(path, DIVERGED).content["message"] if path.is_file() else None

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run for this process; another process that holds it raises."""
        make_folder(self.path)
        try:  # closed below: the lock lasts as long as the handle
            handle = open(self.path / _LOCK, "a+")  # noqa: SIM115
        except OSError as error:
            raise Unavailable(f"cannot write in {str(self.path)!r}: {error.strerror}; give another out=") from error
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
            except BlockingIOError:
                return True
            except OSError:
                return None
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
        try:
            envelope = read_envelope(path, STATE)
            return envelope.content, dict(envelope.tensors())
        except FileRefused as error:
            raise FileRefused(f"{error}; or remove it, and {_AGAIN}") from error

    def rows_of_state(self) -> dict[str, int]:
        """How many rows each file had when the state was written; unknown without an intact state."""
        path = self.path / "state.safetensors"
        try:
            return read_envelope(path, STATE).content.get("rows", {}) if path.is_file() else {}
        except FileRefused:
            return {}

    def foreign_state(self) -> FileRefused:
        """The error for an intact state that belongs to another run."""
        path = str(self.path / "state.safetensors")
        return FileRefused(f"{path!r} is the state of another run; put the right file back, or remove it, and {_AGAIN}")


def _lock(handle: Any, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: runs are not guarded there
        return
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if attempt + 1 < _ATTEMPTS:
                time.sleep(_WAIT)  # a page that looks whether the run is written holds the lock for an instant
                continue
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            raise Unavailable(
                f"{str(path)!r} is being written by {owner}; wait until it ends, stop it, or train in another folder"
            ) from error
        except OSError:  # a file system without locks: runs are not guarded there
            return
    handle.truncate(0)
    handle.write(f"process {os.getpid()}")
    handle.flush()


def plain_json(identity: Mapping[str, Any]) -> str:
    """What a run is, as JSON; numbers of numpy become those of Python."""
    return json.dumps(dict(identity), default=_number)


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON would give it back: lists for tuples."""
    return json.loads(plain_json(identity))


def _number(value: Any) -> Any:
    """The Python number of one of numpy."""
    if isinstance(value, Number) and hasattr(value, "item"):
        return value.item()
    raise WrongType(f"identity() of the data returns plain numbers and texts, in lists and dicts; got {value!r:.80}")


def differences(before: Any, now: Any, name: str = "", *, words: str = "{0} was {1} and is {2}") -> Iterator[str]:
    """Where two nested dicts of plain values differ, in words.

    >>> list(differences({"p": 5, "seed": 0}, {"p": 7, "seed": 0}))
    ['p was 5 and is 7']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key, words=words)
        return
    if before == now:
        return
    if name in _DIGESTS and before is not None and now is not None:
        yield _DIGESTS[name]
    else:
        yield words.format(name, f"{before!r:.60}", f"{now!r:.60}")
