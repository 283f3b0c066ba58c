"""Atomic writing of files, and reading with a clear error for every fault."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hooklens.core.arguments import path_of
from hooklens.core.errors import FileRefused, HooklensError, InputError, NameNotFound, Unavailable

_FULL = "the disk is full (or a quota is reached); free some space, or choose another folder"
_READ_ONLY = "the folder is read-only for this user; choose another one"
_WORDS: dict[Any, str] = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL)
_WORDS |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _READ_ONLY)
_LARGEST_TEXT = 256 * 2**20  # bytes; tokenizer.json files reach 35 MB
_ASIDE = ".hooklens-"
_DAY = 24 * 3600.0


@contextlib.contextmanager
def reading(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Turn every error of the body into one about the file: FileRefused, or InputError if the file is missing.

    >>> with reading("no_such_file.json", "a circuit"):
    ...     text = Path("no_such_file.json").read_text()
    Traceback (most recent call last):
    ...
    hooklens.core.errors.InputError: cannot read a circuit from 'no_such_file.json': there is no such file; ...

    The body only reads and parses, because every exception in it is attributed to the file. Errors of hooklens pass
    through, except for a name that does not exist.
    """
    asked = f"cannot read {what} from {str(path_of(path))!r}:"
    try:
        yield
    except NameNotFound as error:
        raise FileRefused(f"{asked} it holds an unknown name: {error}") from error
    except HooklensError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{asked} there is no such file; check the path") from error
    except OSError as error:
        raise FileRefused(f"{asked} it cannot be read ({error.strerror or error}); check the path") from error
    except BaseException as error:
        # A panic in a Rust library is not an Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FileRefused(f"{asked} {_fault(error)}; save, copy or download it again") from error


def read_text(path: str | os.PathLike, what: str, *, encoding: str = "utf-8", largest: int = _LARGEST_TEXT) -> str:
    """The text of a file of at most `largest` bytes; a device without an end is refused too."""
    with reading(path, what), open(path, "rb") as file:
        raw = file.read(largest + 1)
        if len(raw) > largest:
            raise FileRefused(f"cannot read {what} from {os.fspath(path)!r}: it has over {largest:,} bytes")
        return raw.decode(encoding)


def read_json(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """The JSON object in a file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "sizes.json"
    >>> _ = path.write_text('{"n_layers": 2}')
    >>> read_json(path, "a configuration")
    {'n_layers': 2}
    """
    with reading(path, what):
        return json_object(read_text(path, what))


def json_object(text: str) -> dict[str, Any]:
    """The JSON object in a text; raises for anything else, inside `reading`."""
    held = json.loads(text)
    if not isinstance(held, dict):
        raise TypeError(f"it should hold a JSON object, it holds a {type(held).__name__}")
    return held


def _fault(error: BaseException) -> str:
    """The fault of the file that caused this error."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text ({error.reason} at byte {error.start:,})"
    said = (str(error).strip() or "no further word").splitlines()[0]
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON ({said})"
    return f"it is damaged or of another kind ({type(error).__name__}: {said:.200})"


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file all or nothing: yields a temporary path beside `path`, renamed at the end, removed on an error.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with write_atomically(folder / "numbers.txt") as temporary:
    ...     _ = temporary.write_text("1 2 3")
    >>> [p.name for p in folder.iterdir()]
    ['numbers.txt']

    An existing file keeps its content until the new one is complete, also if the body raises or the program is
    interrupted. A symbolic link is followed, and its target replaced.
    """
    target = _target(path_of(path))
    _sweep_once(target.parent)
    temporary = target.parent / f"{unfinished_name(_ASIDE)}{target.suffix[:16]}"
    try:
        mode = _create(temporary)
        yield temporary
        if not temporary.is_file():
            raise InputError(f"cannot write {str(path)!r}: nothing was written to {temporary.name}")
        os.chmod(temporary, mode)  # some writers leave a private file behind, whatever the umask says
        _flush(temporary)
        os.replace(temporary, target)
    except Exception as error:
        reason = _reason(error, temporary)
        if reason is None:
            raise
        raise Unavailable(f"cannot write {str(path)!r}: {reason}") from error
    finally:
        with contextlib.suppress(OSError):  # fails too where the file system turned read-only, which is said above
            temporary.unlink()


def check_writable(path: str | os.PathLike) -> None:
    """Raise the error that write_atomically would raise for this path, before a long computation.

    >>> check_writable("no_such_folder/report.html")
    Traceback (most recent call last):
    ...
    hooklens.core.errors.InputError: cannot write 'no_such_folder/report.html': there is no folder 'no_such_folder'; ...
    """
    target = _target(path_of(path))
    probe = target.parent / unfinished_name(_ASIDE)
    try:
        _create(probe)
        probe.unlink()
    except OSError as error:
        raise Unavailable(f"cannot write {str(path)!r}: {_reason(error, probe) or error}") from error


def make_folder(path: str | os.PathLike) -> Path:
    """Create a folder, with missing folders above it."""
    folder = path_of(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = _WORDS.get(getattr(error, "errno", None)) or getattr(error, "strerror", None) or error
        raise Unavailable(f"the folder {str(path)!r} cannot be made: {reason}") from error
    return folder


def unfinished_name(prefix: str) -> str:
    """A new name for an unfinished file, with the process in it, so that `sweep` can remove what a dead one left."""
    return f"{prefix}{_machine()}-{os.getpid()}-{secrets.token_hex(6)}"


def sweep(folder: Path, prefix: str) -> None:
    """Remove files and folders of `unfinished_name` that killed processes left in a folder.

    Those of a process of this machine are removed once it no longer runs, all others after a day.
    """
    pattern = re.compile(re.escape(prefix) + r"(?P<machine>[0-9a-f]{8})-(?P<pid>\d{1,9})-[0-9a-f]{12}(\..*)?")
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            owner = pattern.fullmatch(entry.name)
            if owner is None or not _left_behind(entry, owner["machine"], int(owner["pid"])):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


@functools.cache
def _sweep_once(folder: Path) -> None:
    sweep(folder, _ASIDE)


def _left_behind(entry: os.DirEntry, machine: str, pid: int) -> bool:
    # Only POSIX: on Windows os.kill ends the process whatever the signal.
    if os.name == "posix" and machine == _machine():
        if pid == os.getpid():
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # it runs, as another user's
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > _DAY


@functools.cache
def _machine() -> str:
    """The scope of a process id: a host and, on Linux, a namespace of ids, of which each container has its own."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return hashlib.blake2b(f"{socket.gethostname()} {namespace}".encode(), digest_size=4).hexdigest()


def _target(path: Path) -> Path:
    """The real path of the file. Devices and pipes are refused, because a rename would replace them."""
    asked = f"cannot write {str(path)!r}:"
    if not path.name:
        raise InputError(f"{asked} it names a folder; add a file name to it")
    try:
        target = Path(os.path.realpath(path))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            target.stat()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null byte
        raise InputError(f"{asked} {getattr(error, 'strerror', None) or error}; choose another path") from error
    if not target.parent.exists():
        raise InputError(f"{asked} there is no folder {str(path.parent)!r}; make it first, or choose another path")
    if not target.parent.is_dir():
        raise InputError(f"{asked} {str(path.parent)!r} is a file, not a folder; choose another path")
    if target.is_dir():
        raise InputError(f"{asked} it is a folder; add a file name to it")
    if target.exists() and not target.is_file():
        raise InputError(f"{asked} it is a device or a pipe, not a regular file; choose another path")
    return target


def _create(path: Path) -> int:
    """Create the empty file, so that a read-only folder fails before the work starts; return its mode."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)  # a power cut after the rename could otherwise leave an empty file
    finally:
        os.close(handle)


def _reason(error: Exception, temporary: Path) -> str | None:
    """The reason why the write failed; None if the error is not about this file."""
    code, name = getattr(error, "errno", None), getattr(error, "filename", None)
    if code is None and (reported := re.search(r"\(os error (\d+)\)", str(error))):
        code = int(reported.group(1))  # safetensors reports the system's error inside its own
    if name is not None and Path(os.fsdecode(name)) != temporary:
        return None
    return _WORDS.get(code) or (None if name is None else str(getattr(error, "strerror", error)))
