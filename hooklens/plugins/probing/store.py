"""Arrays that are filled batch by batch: in memory, or in memory-mapped files that an interrupted run can continue."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hooklens.core.envelope import Schema, digest, read_envelope, write_envelope
from hooklens.core.errors import FileRefused, InputError, Unavailable
from hooklens.core.files import check_writable, make_folder, reading

_SCHEMA = Schema("hooklens.activations", 1, "a manifest of activations", "gather(..., folder=...)", as_json=True)
_MANIFEST = "activations.json"
Shapes = Mapping[str, tuple[int, ...]]


class Memory:
    """Arrays in memory; no files are needed."""

    done = 0

    def __init__(self, shapes: Shapes, dtype: torch.dtype):
        self.arrays = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}

    def write(self, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        """Store one batch: `values` has the shape of the arrays except for its rows, the second-last axis."""
        for name, value in values.items():
            self.arrays[name][..., rows, :] = value.to(self.arrays[name])

    def finish(self) -> dict[str, Tensor]:
        """The filled arrays."""
        return self.arrays


class Files:
    """Arrays in .npy files of a folder, with a manifest of the stored batches and their checksums.

    An unfinished file is called `x.npy.part` and is renamed when complete. `key` identifies the gathered activations: a
    folder with another key, or with damaged content, raises an error.
    """

    def __init__(self, folder: Path, shapes: Shapes, dtype: torch.dtype, key: str, batches: list[list[int]]):
        self.folder, self.key, self.batches = folder, key, batches
        self.shapes, self.dtype = dict(shapes), str(dtype).removeprefix("torch.")
        self.sums: list[str] = []
        make_folder(folder)
        check_writable(folder / _MANIFEST)
        known = (folder / _MANIFEST).exists()
        if known:
            self._read_manifest()
        self.maps = {name: self._open(name, known) for name in self.shapes}
        self._check()

    @property
    def done(self) -> int:
        """The number of stored batches."""
        return len(self.sums)

    def write(self, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        """Store the next batch, flushed before the manifest records it."""
        for name, value in values.items():
            self.maps[name][..., rows.numpy(), :] = value.cpu().numpy()
            self.maps[name].flush()
        self.sums.append(self._sum(self.batches[self.done]))
        self._write_manifest()

    def finish(self) -> dict[str, Tensor]:
        """Return the complete arrays, mapped copy-on-write: edits in memory never reach the files."""
        self.maps.clear()
        for name in self.shapes:
            if self._path(name, ".part").exists():
                os.replace(self._path(name, ".part"), self._path(name))
        return {name: torch.from_numpy(np.load(self._path(name), mmap_mode="c")) for name in self.shapes}

    def _path(self, name: str, end: str = "") -> Path:
        return self.folder / f"{name}.npy{end}"

    def _read_manifest(self) -> None:
        path = self.folder / _MANIFEST
        manifest = read_envelope(path, _SCHEMA).content
        with reading(path, _SCHEMA.what):
            key, sums = manifest["key"], [str(number) for number in manifest["sums"]]
        if key != self.key:
            raise FileRefused(
                f"{self.folder} contains other activations (of other weights, prompts, sites or positions); "
                "delete it or give another folder"
            )
        self.sums = sums[: len(self.batches)]

    def _write_manifest(self) -> None:
        write_envelope(self.folder / _MANIFEST, _SCHEMA, {"key": self.key, "sums": self.sums})

    def _open(self, name: str, known: bool) -> np.memmap:
        """Open the file to write: that of an earlier run, or a new one with its disk space allocated now."""
        part, shape = self._path(name, ".part"), self.shapes[name]
        here = next((path for path in (self._path(name), part) if path.exists()), None)
        if here is None and known and self.sums:
            raise FileRefused(f"{self.folder} lacks {name}.npy, which its manifest lists; delete the folder")
        if here is not None and not known:
            raise FileRefused(f"{here} already exists and is in no manifest; give another folder")
        if here is None or not self.sums:
            return self._make(part, shape)
        with reading(here, "stored activations"):
            opened = np.load(here, mmap_mode="r+")
        if opened.shape != shape or str(opened.dtype) != self.dtype:
            raise FileRefused(f"{here} holds {opened.dtype} {list(opened.shape)}, expected {self.dtype} {list(shape)}")
        return opened

    def _make(self, path: Path, shape: tuple[int, ...]) -> np.memmap:
        try:
            array = np.lib.format.open_memmap(path, mode="w+", dtype=self.dtype, shape=shape)
            with open(path, "r+b") as file:  # writing to a mapped hole on a full disk would kill the process
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        except OSError as error:
            path.unlink(missing_ok=True)
            need = int(np.prod(shape)) * np.dtype(self.dtype).itemsize
            raise Unavailable(f"{path} cannot be made ({error}); it takes {need / 2**20:,.0f} MiB") from error
        if not (self.folder / _MANIFEST).exists():
            self._write_manifest()
        return array

    def _check(self) -> None:
        for rows, stored in zip(self.batches, self.sums, strict=False):
            if self._sum(rows) != stored:
                raise FileRefused(f"{self.folder} is damaged: its content does not match its checksums; delete it")

    def _sum(self, rows: list[int]) -> str:
        """The digest of a batch: of each file, the header and these rows."""
        pieces: list[bytes | memoryview] = []
        for name in sorted(self.maps):
            with open(str(self.maps[name].filename), "rb") as file:
                pieces.append(file.read(self.maps[name].offset))
            pieces.append(np.ascontiguousarray(self.maps[name][..., rows, :]).data)
        return digest(pieces)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is removed once its files are mapped: their disk space is freed together with the arrays."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="hooklens-activations-", ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(f"no folder for activations could be made ({error}); give folder=") from error
    with folder as path:
        yield Path(path)
