"""Read safetensors files one tensor at a time, each into its own memory.

The safetensors package maps the file instead: its tensors would keep the whole file in memory in addition to the
converted weights, and a file that shrinks later would crash the process.

Reference: the format section of the safetensors README.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import path_of
from hooklens.core.errors import FileRefused
from hooklens.core.files import reading

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGEST_HEADER = 100_000_000  # the format's own limit
_MOST_AXES = 8


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in the file."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A complete safetensors file.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> path = Path(tempfile.mkdtemp()) / "tiny.safetensors"
    >>> save_file({"w": torch.ones(2)}, path)
    >>> file = read_header(path)
    >>> file.entries["w"].shape, file.tensor("w")
    ((2,), tensor([1., 1.]))
    """

    path: Path
    entries: dict[str, Entry] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)

    def tensor(self, name: str, seen: Callable[[memoryview], None] = lambda raw: None) -> Float[Tensor, "..."]:
        """Read one tensor, in the dtype of the file; `seen` receives its bytes."""
        entry = self.entries[name]
        if entry.kind not in DTYPES:
            raise FileRefused(
                f"{self.path.name}: the tensor {name!r} has the type {entry.kind}; supported types: {', '.join(DTYPES)}"
            )
        with reading(self.path, f"the tensor {name!r}"), open(self.path, "rb") as file:
            raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
            file.seek(entry.start)
            if file.readinto(raw.numpy().data) != len(raw):
                raise FileRefused(f"{self.path.name} shrank while the tensor {name!r} was being read; load it again")
            seen(raw.numpy().data)
            return raw.view(DTYPES[entry.kind]).view(entry.shape)


def read_header(path: str | Path) -> SafetensorsFile:
    """Read the header of a safetensors file; a truncated or foreign file raises an error."""
    path = path_of(path)
    with reading(path, "a safetensors file"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _LARGEST_HEADER:
            raise FileRefused(f"{path.name} is not a safetensors file ({size:,} bytes); is it another format?")
        if 8 + length > size:
            raise _cut(path, "its header", 8 + length, size)
        entries, metadata = _parse(file.read(length), 8 + length)
    placed = sorted((entry.start, entry.end) for entry in entries.values())
    starts, ends = [*(start for start, _ in placed), size], [8 + length, *(end for _, end in placed)]
    if max(ends) > size:
        raise _cut(path, f"the tensor {max(entries, key=lambda name: entries[name].end)!r}", max(ends), size)
    if starts != ends:
        raise FileRefused(f"{path.name} is damaged: its tensors overlap or leave gaps; download or save it again")
    return SafetensorsFile(path, entries, metadata)


def _cut(path: Path, what: str, end: int, size: int) -> FileRefused:
    return FileRefused(
        f"{path.name} is cut short: {what} should end at byte {end:,}, the file has {size:,} bytes; "
        "download or copy it again"
    )


def _parse(raw: bytes, base: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of a header. A malformed header raises any error; the caller handles it."""
    header = json.loads(raw, object_pairs_hook=_once)
    metadata = header.pop("__metadata__", {})
    if not all(isinstance(text, str) for text in metadata.values()):
        raise TypeError("its metadata should be strings")
    return {name: _entry(described, base) for name, described in header.items()}, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(described: dict[str, Any], base: int) -> Entry:
    kind, shape, (start, end) = described["dtype"], tuple(described["shape"]), described["data_offsets"]
    if len(shape) > _MOST_AXES or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end)):
        raise ValueError(f"a shape of {len(shape)} axes, or an impossible size or offset")
    if kind in DTYPES and end - start != math.prod(shape) * DTYPES[kind].itemsize:
        raise ValueError(f"{end - start} bytes for {kind} {list(shape)}")
    return Entry(kind, shape, base + start, base + end)


def is_safetensors(path: str | os.PathLike) -> bool:
    """Whether the file begins like a safetensors file: a length, then a JSON object."""
    with open(path, "rb") as file:
        begin = file.read(9)
    return len(begin) == 9 and begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= _LARGEST_HEADER
