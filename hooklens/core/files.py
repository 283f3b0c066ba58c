"""Files that are either whole or not there: write beside the target, then rename."""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from hooklens.core.errors import InputError, Unavailable

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file all or nothing: yields a temporary path beside `path`, renamed at the end, removed on an error.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with write_atomically(folder / "numbers.txt") as temporary:
    ...     _ = temporary.write_text("1 2 3")
    >>> [p.name for p in folder.iterdir()]
    ['numbers.txt']

    An existing file keeps its old content until the new one is complete, also when the body raises
    or the program is interrupted. A symbolic link is followed: what it points to is replaced.
    """
    target = _target(Path(path))
    temporary = target.parent / f".hooklens-{secrets.token_hex(8)}{target.suffix[:16]}"
    try:
        mode = _create(temporary)
        yield temporary
        if not temporary.is_file():
            raise InputError(f"{str(path)!r} was to be written through {temporary.name}, but nothing is there")
        os.chmod(temporary, mode)  # some writers leave a private file behind, whatever the umask says
        _flush(temporary)
        os.replace(temporary, target)
    except Exception as error:
        reason = _reason(error, temporary)
        if reason is None:
            raise
        raise Unavailable(f"cannot write {str(path)!r}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike) -> None:
    """Could `path` be written now? Raises what write_atomically would: ask before a long computation, not after.

    >>> check_writable("no_such_folder/report.html")
    Traceback (most recent call last):
    ...
    hooklens.core.errors.InputError: cannot write 'no_such_folder/report.html': there is no folder 'no_such_folder'; ...
    """
    target = _target(Path(path))
    probe = target.parent / f".hooklens-{secrets.token_hex(8)}"
    try:
        _create(probe)
        probe.unlink()
    except OSError as error:
        raise Unavailable(f"cannot write {str(path)!r}: {_reason(error, probe) or error}") from error


def _target(path: Path) -> Path:
    """Where the bytes will really go. Devices and pipes are refused: a rename would replace them, not write to them."""
    asked = f"cannot write {str(path)!r}:"
    target = Path(os.path.realpath(path))
    if not path.name:
        raise InputError(f"{asked} it names a folder; add a file name to it")
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
    """Make the empty file now, so that a read-only folder is known before the work starts; its mode by the umask."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)  # else a power cut after the rename could leave the new name with no content
    finally:
        os.close(handle)


def _reason(error: Exception, temporary: Path) -> str | None:
    """What stopped the write, in words; None when the error is not about this file."""
    code, name = getattr(error, "errno", None), getattr(error, "filename", None)
    if code is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        code = int(found.group(1))  # safetensors reports the system's error inside its own
    if name is not None and Path(os.fsdecode(name)) != temporary:
        return None
    if code in _FULL:
        return "the disk is full (or a quota is reached); free some space, or choose another folder"
    if code in _READ_ONLY:
        return "the folder is read-only for this user; choose another one"
    return None
