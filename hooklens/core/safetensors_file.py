"""safetensors files: written from the tensors' own memory, and read one tensor at a time.

The safetensors package reads with `pread` here. Its default maps the file: mapped tensors would keep the whole file in
memory in addition to the converted weights, and a file that shrinks later would crash the process.
"""

import json
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

from hooklens.core.arguments import path_of
from hooklens.core.errors import FileRefused
from hooklens.core.files import reading

#: The name of each dtype in the format.
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
# What the package's errors mean for the file, by a part of their text.
_FAULTS = {
    "header too": "it is not a safetensors file",
    "invalid header length": "it is cut short",
    "not fully covered": "it is cut short, or bytes follow that belong to no tensor",
}


class Entry(NamedTuple):
    """The dtype of a tensor in the file, as the format calls it, and its shape."""

    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SafetensorsFile:
    """An open safetensors file, whose header the package has found consistent with the size of the file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "tiny.safetensors"
    >>> write_safetensors(path, {"w": torch.tensor([5, 6], dtype=torch.uint8)}, {})
    >>> file = read_header(path)
    >>> file.entries["w"].shape, file.tensor("w", kinds=DTYPES)
    ((2,), tensor([5, 6], dtype=torch.uint8))
    """

    path: Path
    entries: dict[str, Entry] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    header: bytes = field(repr=False)  # without its length
    handle: Any = field(repr=False)

    def tensor(self, name: str, kinds: Container[str] = FLOATS) -> Shaped[Tensor, "..."]:
        """One tensor in memory of its own, in the dtype that the file has, which must be one of `kinds`."""
        entry = self.entries[name]
        if entry.kind not in DTYPES or entry.kind not in kinds:
            raise FileRefused(
                f"{self.path.name}: the tensor {name!r} has the type {entry.kind}; "
                f"supported types: {', '.join(kind for kind in DTYPES if kind in kinds)}"
            )
        with reading(self.path, f"the tensor {name!r}"):
            return self.handle.get_tensor(name)

    def is_canonical(self) -> bool:
        """Whether the package would write this header again with the same bytes."""
        text = json.dumps(json.loads(self.header), separators=(",", ":"), ensure_ascii=False).encode()
        return self.header == text + b" " * (-len(text) % 8)


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write contiguous tensors of the CPU without a copy of them in memory.

    The same tensors give the same bytes in any order. Several keys of metadata do not: the package writes them in an
    order that differs from process to process.
    """
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
    serialize_file(specs, path, metadata)


def read_header(path: str | os.PathLike, what: str = "a safetensors file") -> SafetensorsFile:
    """Open a safetensors file. A truncated file or one of another format raises an error about `what` was expected."""
    path = path_of(path)
    with reading(path, what), open(path, "rb") as raw:
        try:
            handle = safe_open(path, "pt", backend="pread")
        except SafetensorError as error:
            fault = next((fault for text, fault in _FAULTS.items() if text in str(error)), "it is damaged")
            raise FileRefused(
                f"cannot read {what} from {str(path)!r}: {fault} ({path.stat().st_size:,} bytes; {error}); "
                "download, copy or save it again"
            ) from error
        slices = {name: handle.get_slice(name) for name in handle.offset_keys()}
        entries = {name: Entry(tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
        header = raw.read(int.from_bytes(raw.read(8), "little"))
    return SafetensorsFile(path, entries, handle.metadata() or {}, header, handle)


def is_safetensors(path: str | os.PathLike) -> bool:
    """Whether the file begins like a safetensors file: a length, then a JSON object."""
    with open(path, "rb") as file:
        begin = file.read(9)
    return len(begin) == 9 and begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= LARGEST_HEADER
