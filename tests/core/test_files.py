"""Files are whole or not there, and what stops a write is said in words."""

import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hooklens.core.errors import FileRefused, InputError, Unavailable
from hooklens.core.files import (
    check_writable,
    make_folder,
    read_json,
    read_text,
    reading,
    sweep,
    unfinished_name,
    write_atomically,
)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_file_appears_at_the_end_only(tmp_path):
    with write_atomically(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a.txt").exists()
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"
    assert (tmp_path / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, interruption):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(interruption), write_atomically(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise interruption
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_relative_path_is_written_where_it_pointed_at_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with write_atomically("a.txt") as temporary:
        temporary.write_text("x")
        os.chdir(tmp_path / "elsewhere")
    assert names(tmp_path) == ["a.txt", "elsewhere"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "a.txt")
    with write_atomically(tmp_path / "link.txt") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "x"


def test_permissions_follow_the_umask_even_if_the_writer_made_a_private_file(tmp_path):
    old = os.umask(0o022)
    try:
        with write_atomically(tmp_path / "a") as temporary:
            temporary.write_text("x")
            os.chmod(temporary, 0o600)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("missing/a.txt", "there is no folder"),
        ("file/a.txt", "is a file, not a folder"),
        ("folder", "it is a folder"),
        ("pipe", "not a regular file"),
    ],
)
def test_a_path_that_cannot_be_a_file_is_refused_before_the_body_runs(tmp_path, path, says):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    with pytest.raises(InputError, match=says):
        check_writable(tmp_path / path)
    with pytest.raises(InputError, match=says), write_atomically(tmp_path / path):
        pytest.fail("the body ran")
    assert names(tmp_path) == before


@pytest.mark.parametrize("path", [".", "", "/"])
def test_a_path_without_a_name_is_refused(path):
    with pytest.raises(InputError, match=r"add a file name|names no file"):
        check_writable(path)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
    ],
)
def test_a_write_that_fails_half_way_says_why(tmp_path, error, says):
    with pytest.raises(Unavailable, match=says) as caught, write_atomically(tmp_path / "a.txt"):
        raise error
    assert caught.value.__cause__ is error
    assert names(tmp_path) == []


# Every file of this process may have 30 kB: what a full disk does to a write, without a disk, a mount or root.
FULL = """
import pathlib, resource, sys
from dataclasses import replace
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
from hooklens.core.errors import Unavailable
from hooklens.core.files import write_atomically
from hooklens.plugins.patching.activation import demo
from hooklens.pretrained.checkpoint import save
from hooklens.testing import tiny_model
from hooklens.viz.report import Report

def text(path):
    with write_atomically(path) as aside:
        aside.write_text("x" * 100_000)

model, out = tiny_model(d_mlp=2048), pathlib.Path(sys.argv[1])
sweep = demo(model)
for name, write in {
    "text": text,
    "cache": model.run_with_cache([[1] * 32])[1].save,
    "result": replace(sweep, per_pair=sweep.per_pair.repeat(2000, 1, 1)).save,
    "model.safetensors": lambda path: save(model, path),
    "report": Report("page").figure(sweep.figure()).save,
}.items():
    try:
        write(out / name)
        print(name, "was written")
    except Unavailable as error:
        print(name, "is full" if "the disk is full" in str(error) and str(out / name) in str(error) else error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a process's files")
def test_on_a_full_disk_every_writer_says_so_and_leaves_what_was_there(tmp_path):
    (tmp_path / "cache").write_text("old")
    command = [sys.executable, "-B", "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    writers = ["text", "cache", "result", "model.safetensors", "report"]
    assert done.stdout.splitlines() == [f"{name} is full" for name in writers], done.stderr
    assert names(tmp_path) == ["cache"] and (tmp_path / "cache").read_text() == "old"


def test_an_error_about_another_file_passes_through(tmp_path):
    with pytest.raises(PermissionError), write_atomically(tmp_path / "a.txt"):
        raise PermissionError(errno.EACCES, "Permission denied", "/another/file")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_read_only_folder_is_known_before_the_body_runs(tmp_path, monkeypatch, code):
    def refuse(path, *_):
        raise OSError(code, os.strerror(code), str(path))

    # a folder that even the superuser cannot write to needs a read-only mount, hence the stand-in
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(Unavailable, match="read-only"):
        check_writable(tmp_path / "a.txt")
    with pytest.raises(Unavailable, match="read-only"), write_atomically(tmp_path / "a.txt"):
        pytest.fail("the body ran")


def test_a_body_that_writes_nothing_of_its_own_leaves_an_empty_file_and_one_that_removes_it_is_told(tmp_path):
    with write_atomically(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").read_bytes() == b""
    with pytest.raises(InputError, match="nothing was written to"), write_atomically(tmp_path / "gone") as temporary:
        temporary.unlink()


def test_a_failed_write_is_told_although_removing_the_temporary_file_fails_too(tmp_path, monkeypatch):
    def refuse(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    # a disk error turns the whole file system read-only, so that nothing can be removed any more
    with pytest.raises(Unavailable, match="the disk is full"), write_atomically(tmp_path / "a.txt"):
        monkeypatch.setattr(Path, "unlink", refuse)
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"], ids=["too long", "null byte"])
def test_a_name_that_no_file_can_have_is_refused_before_the_work(tmp_path, name):
    with pytest.raises(InputError, match=r"cannot write .*(File name too long|null byte)"):
        check_writable(tmp_path / name)
    with pytest.raises(Unavailable, match="cannot be made"):
        make_folder(tmp_path / name)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match=r"file.below' cannot be made: Not a directory"):
        make_folder(tmp_path / "file" / "below")
    assert make_folder(tmp_path / "a" / "b").is_dir()


class PanicException(BaseException):
    """What a panic in a Rust library becomes."""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            PanicException("index out of bounds\nnote: run with"),
            r"damaged or .* \(PanicException: index out of",
        ),
        (RecursionError("maximum depth"), "nested too deeply"),
        (MemoryError(), "more memory than there is"),
        (KeyError("format"), "KeyError: 'format'"),
        (OverflowError("int too big"), "OverflowError"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid start byte"), "not UTF-8 text"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be read \\(Permission denied\\)"),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), "Is a directory"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "File name too long"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_a_reader_meets_is_one_error_with_the_path(error, says):
    with pytest.raises(FileRefused, match=says) as caught, reading("here.json", "a plan"):
        raise error
    assert caught.value.__cause__ is error and "cannot read a plan from 'here.json':" in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), InputError("in words already")])
def test_interrupts_and_errors_in_words_pass_through_a_reader(error):
    with pytest.raises(type(error)) as caught, reading("here.json", "a plan"):
        raise error
    assert caught.value is error


def test_a_missing_file_is_said_to_be_missing_and_a_deep_or_endless_one_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        read_json(tmp_path / "none.json", "a plan")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(FileRefused, match="nested too deeply"):
        read_json(tmp_path / "deep.json", "a plan")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(FileRefused, match="holds a list"):
        read_json(tmp_path / "list.json", "a plan")
    with pytest.raises(FileRefused, match="over 1,000 bytes"):
        read_text("/dev/zero", "a plan", largest=1000)


def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_writer_left_goes_at_the_next_write(tmp_path):
    """SIGKILL leaves the temporary file: it goes once its owner is gone; that of a living one stays for a day."""
    mine = unfinished_name(".hooklens-") + ".txt"
    machine, pid = mine.removeprefix(".hooklens-").split("-")[:2]
    killed, other = mine.replace(f"-{pid}-", f"-{dead()}-"), mine.replace(f"-{machine}-", "-00000000-")
    running, old = mine.replace(f"-{pid}-", f"-{os.getppid()}-"), other.replace(".txt", ".old")
    for name in (mine, killed, other, running, old, ".hooklens-notes", "a.txt"):
        (tmp_path / name).write_text("")
    os.utime(tmp_path / old, (time.time() - 90_000,) * 2)
    with write_atomically(tmp_path / "a.txt") as aside:
        aside.write_text("x")
    assert set(names(tmp_path)) == {mine, other, running, ".hooklens-notes", "a.txt"}
    (tmp_path / mine.replace(f"-{pid}-", f"-{dead()}-") / "inside").mkdir(parents=True)
    sweep(tmp_path, ".hooklens-")
    assert set(names(tmp_path)) == {mine, other, running, ".hooklens-notes", "a.txt"}
