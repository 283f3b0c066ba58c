"""safetensors files, written without gaps and read one tensor at a time, each into memory of its own.

The safetensors package maps the file instead: its tensors would keep the whole file in memory in addition to the
converted weights, and a file that shrinks later would crash the process.

Reference: the format section of the safetensors README.
"""

import json
import math
import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from hooklens.core.arguments import path_of
from hooklens.core.errors import FileRefused
from hooklens.core.files import reading

# What the format calls each dtype, the widest first: tensors in this order are aligned without gaps.
DTYPES: dict[str, torch.dtype] = {
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
#: The dtypes of weights: integers would be quantised ones, which mean nothing without their scales.
FLOATS = ("F64", "F32", "F16", "BF16")
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
_ALIGNMENT = 8
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
    >>> path = Path(tempfile.mkdtemp()) / "tiny.safetensors"
    >>> _ = path.write_bytes(header_of({"w": ("U8", [2])}, {})[0] + bytes([5, 6]))
    >>> file = read_header(path)
    >>> file.entries["w"].shape, file.tensor("w", kinds=DTYPES)
    ((2,), tensor([5, 6], dtype=torch.uint8))
    """

    path: Path
    entries: dict[str, Entry] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    header: bytes = field(repr=False)  # with its length in front

    def tensor(
        self, name: str, seen: Callable[[memoryview], None] = lambda raw: None, kinds: Container[str] = FLOATS
    ) -> Shaped[Tensor, "..."]:
        """One tensor, in the dtype that the file has, which is to be one of `kinds`; `seen` is given its bytes."""
        entry = self.entries[name]
        if entry.kind not in DTYPES or entry.kind not in kinds:
            raise FileRefused(
                f"{self.path.name}: the tensor {name!r} has the type {entry.kind}; "
                f"supported types: {', '.join(kind for kind in DTYPES if kind in kinds)}"
            )
        with reading(self.path, f"the tensor {name!r}"), open(self.path, "rb") as file:
            raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
            file.seek(entry.start)
            if file.readinto(raw.numpy().data) != len(raw):
                raise FileRefused(f"{self.path.name} shrank while the tensor {name!r} was being read; load it again")
            seen(raw.numpy().data)
            return raw.view(DTYPES[entry.kind]).view(entry.shape)


def header_of(
    described: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """What a file begins with, and the names in the order in which their bytes follow.

    `described` has the dtype and the shape of every tensor. The same content gives the same bytes.
    """
    kinds = list(DTYPES)
    placed = sorted(described, key=lambda name: (kinds.index(described[name][0]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in placed:
        kind, shape = described[name]
        start, end = end, end + math.prod(shape) * DTYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, placed


def read_header(path: str | os.PathLike, what: str = "a safetensors file") -> SafetensorsFile:
    """What a safetensors file holds; one that is cut short, or is none, is refused here as `what` it should be."""
    path = path_of(path)
    asked = f"{what} was to be read from {str(path)!r}, but"
    with reading(path, what), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > LARGEST_HEADER:
            raise FileRefused(f"{asked} it is not a safetensors file ({size:,} bytes); is it another format?")
        if 8 + length > size:
            raise _cut(asked, "its header", 8 + length, size)
        file.seek(0)
        header = file.read(8 + length)
        entries, metadata = _parse(header[8:], 8 + length)
    placed = sorted((entry.start, entry.end) for entry in entries.values())
    starts, ends = [*(start for start, _ in placed), size], [8 + length, *(end for _, end in placed)]
    if max(ends) > size:
        raise _cut(asked, f"the tensor {max(entries, key=lambda name: entries[name].end)!r}", max(ends), size)
    if starts != ends:
        raise FileRefused(f"{asked} it is damaged: its tensors overlap or leave gaps; download or save it again")
    return SafetensorsFile(path, entries, metadata, header)


def _cut(asked: str, what: str, end: int, size: int) -> FileRefused:
    return FileRefused(
        f"{asked} it is cut short: {what} should end at byte {end:,}, the file has {size:,} bytes; "
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
    return len(begin) == 9 and begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= LARGEST_HEADER
