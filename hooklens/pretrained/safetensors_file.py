"""safetensors files, one tensor at a time, each into memory of its own.

The safetensors package maps the file instead: its tensors would keep the whole file in memory beside the converted
weights, and a file that shrinks later would end the process.

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

from hooklens.core.errors import FileRefused

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in the file."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file that was found whole.

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
        """One tensor, in the dtype that the file has; `seen` is given its bytes."""
        entry = self.entries[name]
        if entry.kind not in DTYPES:
            raise FileRefused(
                f"{self.path.name}: the tensor {name!r} is stored as {entry.kind}; "
                f"types that can be read: {', '.join(DTYPES)}"
            )
        raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        with open(self.path, "rb") as file:
            file.seek(entry.start)
            if file.readinto(raw.numpy().data) != len(raw):
                raise FileRefused(f"{self.path.name} became shorter while the tensor {name!r} was read; read it again")
        seen(raw.numpy().data)
        return raw.view(DTYPES[entry.kind]).view(entry.shape)


def read_header(path: str | Path) -> SafetensorsFile:
    """What a safetensors file holds; one that is cut short, or is none, is refused here."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _LARGEST_HEADER:
            raise FileRefused(f"{path.name} is not a safetensors file ({size:,} bytes); is it another format?")
        if 8 + length > size:
            raise _cut(path, "its header", 8 + length, size)
        raw = file.read(length)
    entries, metadata = _parse(path, raw, 8 + length)
    ends = [8 + length, *(entry.end for entry in sorted(entries.values(), key=lambda entry: entry.start))]
    starts = [*(entry.start for entry in sorted(entries.values(), key=lambda entry: entry.start)), size]
    if max(ends) > size:
        raise _cut(path, f"the tensor {max(entries, key=lambda name: entries[name].end)!r}", max(ends), size)
    if starts != ends:
        raise FileRefused(f"{path.name} is damaged: its tensors overlap or leave holes; download or save it again")
    return SafetensorsFile(path, entries, metadata)


def _cut(path: Path, what: str, end: int, size: int) -> FileRefused:
    return FileRefused(
        f"{path.name} is cut short: {what} should end at byte {end:,}, the file has {size:,} bytes; "
        "download or copy it again"
    )


def _parse(path: Path, raw: bytes, base: int) -> tuple[dict[str, Entry], dict[str, str]]:
    try:
        header = json.loads(raw, object_pairs_hook=_once)
        metadata = header.pop("__metadata__", {})
        return {name: _entry(described, base) for name, described in header.items()}, metadata
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileRefused(
            f"{path.name} is not a whole safetensors file: its header cannot be read ({error}); "
            "download or save it again"
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(described: dict[str, Any], base: int) -> Entry:
    kind, shape, (start, end) = described["dtype"], tuple(described["shape"]), described["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"shape {shape} and offsets {start}, {end}")
    if kind in DTYPES and end - start != math.prod(shape) * DTYPES[kind].itemsize:
        raise ValueError(f"{end - start} bytes for {kind} {list(shape)}")
    return Entry(kind, shape, base + start, base + end)


def is_safetensors(path: str | os.PathLike) -> bool:
    """Does the file begin like one: a length, then a JSON object?"""
    with open(path, "rb") as file:
        begin = file.read(9)
    return len(begin) == 9 and begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= _LARGEST_HEADER
