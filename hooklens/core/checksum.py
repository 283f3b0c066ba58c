"""Files that know whether they are whole: tensors with metadata, or JSON, each with a checksum over all that it holds.

Every format of hooklens is written and read here. The same content gives the same bytes: names are sorted where their
order says nothing. A file whose content is not what its checksum says is refused before anything in it is used.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.files import reading, write_atomically

#: Where the checksum stands, among the metadata of a safetensors file or the keys of a JSON object.
FIELD = "sha256"
# What safetensors calls each dtype, the widest first: tensors in this order are aligned without gaps.
_DTYPES: dict[torch.dtype, str] = {
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_ALIGNMENT = 8


class Digest:
    """Two SHA-256: of metadata, names, dtypes and shapes, known at once, and of the tensors' bytes in order of name.

    >>> digest = Digest({"format": "a"}, {"x": ("F32", (2,))})
    >>> digest.update(bytes(8))
    >>> digest.agrees({"format": "a", FIELD: digest.hex()})
    True
    """

    def __init__(self, metadata: Mapping[str, str], described: Mapping[str, tuple[str, Iterable[int]]]):
        said = {name: text for name, text in metadata.items() if name != FIELD}
        tensors = [[name, kind, list(shape)] for name, (kind, shape) in sorted(described.items())]
        self.header, self.content = hashlib.sha256(_canonical([said, tensors])).hexdigest(), hashlib.sha256()
        self.update = self.content.update

    def hex(self) -> str:
        """What the file keeps, once it was given all bytes."""
        return f"{self.header}:{self.content.hexdigest()}"

    def agrees(self, metadata: Mapping[str, str]) -> bool:
        """Is the file whole? Asked once it was given all bytes."""
        return metadata.get(FIELD) == self.hex()

    def header_agrees(self, metadata: Mapping[str, str]) -> bool:
        """Is everything whole but the tensors' bytes, which nobody has read yet?"""
        return str(metadata.get(FIELD)).startswith(f"{self.header}:")


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and texts as one safetensors file, whole or not at all, with a checksum over everything.

    >>> import tempfile
    >>> from pathlib import Path
    >>> path = Path(tempfile.mkdtemp()) / "tiny.safetensors"
    >>> save_tensors(path, {"x": torch.ones(2)}, {"format": "tiny-1"})
    >>> load_tensors(path, "tiny-1", "a tiny file")[0]
    {'x': tensor([1., 1.])}
    """
    dense = {name: tensor.detach().cpu().resolve_conj().resolve_neg().contiguous() for name, tensor in tensors.items()}
    digest = Digest(metadata, {name: (_kind(name, one), one.shape) for name, one in dense.items()})
    for name in sorted(dense):
        digest.update(_bytes(dense[name]))
    header: dict[str, Any] = {"__metadata__": {**metadata, FIELD: digest.hex()}}
    placed = sorted(dense, key=lambda name: (list(_DTYPES).index(dense[name].dtype), name))
    end = 0
    for name in placed:
        start, end = end, end + dense[name].nbytes
        header[name] = {
            "dtype": _kind(name, dense[name]),
            "shape": list(dense[name].shape),
            "data_offsets": [start, end],
        }
    text = _canonical(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    with write_atomically(path) as aside, open(aside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in placed:
            file.write(_bytes(dense[name]))


def load_tensors(path: str | os.PathLike, format: str, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that `save_tensors` wrote, once its checksum was found right.

    `what` is what the file should be, for the message of a damaged or foreign one.
    """
    from safetensors import safe_open

    with reading(path, what):
        with safe_open(str(path), "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != format:
                raise ValueError(f"it is another file, its format is {metadata.get('format')!r} and not {format!r}")
            tensors = {name: _own_copy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
        digest = Digest(metadata, {name: (_kind(name, one), one.shape) for name, one in tensors.items()})
        for name in sorted(tensors):
            digest.update(_bytes(tensors[name]))
        if not digest.agrees(metadata):
            raise ValueError("its content is not what its checksum says")
    return tensors, metadata


def sealed_json(held: Mapping[str, Any]) -> str:
    """A JSON object as text, with a checksum over everything in it.

    >>> unsealed(json.loads(sealed_json({"n": 1})))
    {'n': 1}
    """
    return json.dumps({**held, FIELD: _sum(held)}, allow_nan=False) + "\n"


def unsealed(held: dict[str, Any]) -> dict[str, Any]:
    """The object that `sealed_json` wrote, without its checksum; ValueError where it is not whole.

    Called inside `reading(path, what)`, which says so of the file.
    """
    if held.pop(FIELD) != _sum(held):
        raise ValueError("its content is not what its checksum says")
    return held


def _sum(held: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({name: item for name, item in held.items() if name != FIELD})).hexdigest()


def _canonical(held: Any) -> bytes:
    return json.dumps(held, sort_keys=True, separators=(",", ":")).encode()


def _kind(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in _DTYPES:
        raise InputError(f"{name} is {tensor.dtype}, which a file cannot hold; convert it first")
    return _DTYPES[tensor.dtype]


def _own_copy(mapped: Tensor) -> Tensor:
    """A copy byte by byte (a bool that is neither 0 nor 1 stays so), because the file may be overwritten later."""
    return mapped.reshape(-1).view(torch.uint8).clone().view(mapped.dtype).view(mapped.shape)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
