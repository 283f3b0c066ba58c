"""GGUF files: read the header, refuse damaged files, and return float tensors one at a time.

The gguf package supplies the table of tensor types. Its reader is not used: it builds an array object for each of the
hundred thousand strings of a vocabulary (3.3 s for a 98 MB model; this reader takes 0.1 s), and it maps the whole file
without checking that the file is complete.

Reference: the GGUF specification, docs/gguf.md in the ggml repository.
"""

import mmap
import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from hooklens.core.arguments import path_of
from hooklens.core.errors import FileRefused
from hooklens.core.files import reading
from hooklens.pretrained.dequantize import DEQUANTISERS, can_dequantise, dequantise

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Number of values dequantised at a time. Deliberately below torch's threshold for threads (32,768): thousands of tiny
# parallel regions cost nothing on an idle machine, but 10 to 30 s if another process keeps the cores busy.
_CHUNK = 1 << 14
_LONGEST_ARRAY = 1 << 24  # elements; the vocabularies are below a million


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in the file; `shape` is in torch's order, the reverse of the file's."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A complete GGUF file: its metadata, and its tensors on demand.

    >>> import gguf, tempfile
    >>> path = Path(tempfile.mkdtemp()) / "tiny.gguf"
    >>> writer = gguf.GGUFWriter(path, "llama")
    >>> writer.add_context_length(8)
    >>> writer.add_tensor("output_norm.weight", torch.ones(4).numpy())
    >>> for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file): write()
    >>> writer.close()
    >>> file = read_gguf(path)
    >>> file.architecture, file.metadata["llama.context_length"], file.tensor("output_norm.weight")
    ('llama', 8, tensor([1., 1., 1., 1.]))
    """

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, GGUFTensor] = field(repr=False)

    @property
    def architecture(self) -> str:
        """The model's architecture, as llama.cpp names it."""
        return self.require("general.architecture")

    def require(self, key: str) -> Any:
        """The metadata under `key`; a missing key raises an error that lists similar keys."""
        if key not in self.metadata:
            near = [known for known in self.metadata if known.split(".")[0] == key.split(".")[0]]
            raise FileRefused(
                f"{self.path.name} has no metadata key {key!r}, which is needed to build the model; "
                f"similar keys in it: {', '.join(near) or 'none'}; convert the model again"
            )
        return self.metadata[key]

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Float[Tensor, "..."]:
        """One tensor by its name in the file, dequantised, in the layout of the file."""
        ((_, weight),) = self.read([name])
        return weight.to(dtype)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Float32[Tensor, "..."]]]:
        """The tensors with these names, one at a time. Types are checked before the first one is read."""
        self._check_types([self.tensors[name] for name in names])
        return self._read(names)

    def _read(self, names: Collection[str]) -> Iterator[tuple[str, Float32[Tensor, "..."]]]:
        with reading(self.path, "a model's weights"), open(self.path, "rb") as file:
            for name in names:
                yield name, _dequantised(file, self.tensors[name])

    def _check_types(self, tensors: list[GGUFTensor]) -> None:
        """Refuse tensor types that cannot be converted to floats."""
        readable = {kind for kind in {info.kind for info in tensors} if can_dequantise(kind)}
        for info in tensors:
            if info.kind not in readable:
                raise FileRefused(
                    f"{self.path.name}: the tensor {info.name!r} has the unreadable type {info.kind}; readable "
                    f"types: {', '.join(DEQUANTISERS)} and those of gguf.dequantize; quantise the model to one of these"
                )


def read_gguf(path: str | Path) -> GGUFFile:
    """Read a GGUF file's header; tensors stay on disk until they are requested.

    A file that is not GGUF, is truncated, or declares tensors beyond its end raises an error.
    """
    path = path_of(path)
    with reading(path, "a GGUF model"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        magic = file.read(4)
        if magic != b"GGUF":
            raise FileRefused(
                f"{path.name} begins with {magic!r}, but a GGUF file begins with b'GGUF'; is it another format?"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(data, path.name)
            metadata, tensors = header.read()
    held = sum(info.nbytes for info in tensors.values())
    for info in tensors.values():
        if info.offset + info.nbytes > size:
            raise FileRefused(
                f"{path.name} is cut short: the tensor {info.name!r} should end at byte {info.offset + info.nbytes:,}, "
                f"the file has {size:,} bytes; download or copy it again"
            )
    if held > size:  # a small file must not expand to a large model
        raise header.damaged(f"its tensors overlap: they need {held:,} bytes, the file has {size:,}")
    return GGUFFile(path, metadata, tensors)


class _Header:
    """A cursor over the header that never reads past the end of the file."""

    def __init__(self, data: mmap.mmap | bytes, name: str) -> None:
        self.data = data
        self.name = name
        self.at = 4

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        """Metadata and tensor descriptions."""
        version = self.number("I")
        if version not in (2, 3):
            big = " (it was written for big-endian machines)" if version & 0xFFFF == 0 else ""
            raise FileRefused(
                f"{self.name} is GGUF version {version}{big}; supported versions are 2 and 3: convert it again"
            )
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.string()
            self.once(key, metadata, "metadata key")
            metadata[key] = self.value(self.number("I"))
        described = [self.description() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.damaged(f"general.alignment is {alignment!r}, it must be a positive whole number")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, dims, kind, offset in described:
            self.once(name, tensors, "tensor")
            tensors[name] = self.tensor(name, dims, kind, start + offset)
        return metadata, tensors

    def take(self, n: int) -> int:
        """Advance n bytes and return where they begin."""
        start, self.at = self.at, self.at + n
        if self.at > len(self.data):
            raise FileRefused(
                f"{self.name} is cut short: its header runs past the end of the file ({len(self.data):,} bytes); "
                "download or copy it again"
            )
        return start

    def damaged(self, what: str) -> FileRefused:
        return FileRefused(f"{self.name} is damaged: {what}; download or convert it again")

    def once(self, name: str, seen: dict[str, Any], what: str) -> None:
        if name in seen:
            raise self.damaged(f"the {what} {name!r} occurs twice")

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = self.number("Q")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8")

    def value(self, code: int) -> Any:
        if code == _STRING:
            return self.string()
        if code == _ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        if code not in _SCALARS:
            raise self.damaged(f"unknown metadata type {code} (near byte {self.at})")
        return self.number(_SCALARS[code])

    def array(self, code: int, length: int) -> list[Any]:
        if code == _STRING:
            return [self.string() for _ in range(length)]
        if code not in _SCALARS:
            raise self.damaged(f"unknown array type {code} (near byte {self.at})")
        size = struct.calcsize(f"<{_SCALARS[code]}")
        start = self.take(length * size)
        if length > _LONGEST_ARRAY:  # a list takes up to 36 bytes an element
            raise self.damaged(f"an array has {length:,} elements (near byte {start})")
        return list(struct.unpack_from(f"<{length}{_SCALARS[code]}", self.data, start))

    def description(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dims = self.string(), self.number("I")
        if n_dims > 8:
            raise self.damaged(f"the tensor {name!r} claims {n_dims} dimensions")
        dims = tuple(self.number("Q") for _ in range(n_dims))
        return name, dims[::-1], self.number("I"), self.number("Q")

    def tensor(self, name: str, shape: tuple[int, ...], code: int, offset: int) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(code)
            per_block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise FileRefused(
                f"{self.name}: the tensor {name!r} has the type number {code}, which the installed gguf package does "
                "not know; a newer gguf package may know it"
            ) from None
        if shape and shape[-1] % per_block:
            raise self.damaged(
                f"the tensor {name!r} has rows of {shape[-1]} values, but {kind.name} needs a multiple of {per_block}"
            )
        return GGUFTensor(name, shape, kind.name, offset, prod(shape) // per_block * block_bytes)


def _dequantised(file: Any, info: GGUFTensor) -> Float32[Tensor, "..."]:
    """Read a tensor as float32, chunk by chunk, so that no second copy of it is ever in memory."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[info.kind]]
    out = torch.empty(info.shape, dtype=torch.float32)
    values = out.view(-1, per_block)
    step = max(1, _CHUNK // per_block)
    buffer = torch.empty(min(step, max(1, len(values))) * block_bytes, dtype=torch.uint8)
    file.seek(info.offset)
    for start in range(0, len(values), step):
        piece = values[start : start + step]
        raw = buffer[: len(piece) * block_bytes]
        if file.readinto(raw.numpy()) != len(raw):
            raise FileRefused(f"{file.name} shrank while the tensor {info.name!r} was being read; load it again")
        dequantise(info.kind, raw.view(-1, block_bytes), piece)
    return out
