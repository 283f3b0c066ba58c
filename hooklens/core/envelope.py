"""The envelope of every file that hooklens writes and reads: a schema's name and version, a content, and one digest.

A file with tensors is a safetensors file with these four as JSON under one key of its metadata; a file that people read
and commit is a JSON object of the same four. The digest covers the schema, the content, and every tensor's name, dtype,
shape and bytes. The same content gives the same bytes, so a file is intact if writing its content again
would give the same bytes.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from hooklens.core.errors import FileRefused, InputError
from hooklens.core.files import json_object, read_text, reading, write_atomically
from hooklens.core.fingerprint import raw_bytes
from hooklens.core.safetensors_file import (
    DTYPES,
    LARGEST_HEADER,
    Entry,
    SafetensorsFile,
    read_header,
    write_safetensors,
)

_KEY = "hooklens"  # the only key of a safetensors file's metadata
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
Described = Mapping[str, tuple[str, Sequence[int]]]  # the dtype of every tensor, named as in the format, and its shape


@dataclass(frozen=True)
class Schema:
    """A kind of file: name, version, description and writer for messages; with tensors or as JSON."""

    name: str
    version: int
    what: str
    writer: str
    as_json: bool = False

    def check(self, path: str | os.PathLike, header: Mapping[str, Any]) -> None:
        """Raise unless the file has this schema and version."""
        name, version = header.get("schema"), str(header.get("version"))
        if name != self.name:
            seen = f"it is another file: its schema is {name!r:.60} and not {self.name!r}"
            raise self.refused(path, seen, f"write one with {self.writer}")
        if version != str(self.version):
            newer = version.isdecimal() and int(version) > self.version
            seen = f"it has version {version:.20} of {name!r}, and this hooklens reads version {self.version}"
            raise self.refused(path, seen, "install a newer one" if newer else f"write it again with {self.writer}")

    def damaged(self, path: str | os.PathLike) -> FileRefused:
        """The error for a file that was changed after it was written."""
        seen = "its content is not what its digest says: it was damaged or edited"
        return self.refused(path, seen, f"copy it again, or write it again with {self.writer}")

    def refused(self, path: str | os.PathLike, seen: str, mend: str) -> FileRefused:
        """The error for a file that is refused."""
        return FileRefused(f"cannot read {self.what} from {os.fspath(path)!r}: {seen}; {mend}")


@dataclass(frozen=True)
class Envelope:
    """A file of the right schema and version. Everything in it but the tensors' bytes has been checked."""

    schema: Schema
    path: str | os.PathLike
    content: Any
    data: str = ""  # the digest of the tensors' bytes
    file: SafetensorsFile | None = field(default=None, repr=False)

    @property
    def entries(self) -> dict[str, Entry]:
        """The dtype and shape of each tensor, before any is read."""
        return {} if self.file is None else self.file.entries

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, read one at a time; after the last one, changed bytes raise an error."""
        if self.file is None:
            return
        total = hashlib.sha256()
        for name in sorted(self.file.entries):
            tensor = self.file.tensor(name, DTYPES)
            total.update(raw_bytes(tensor))
            yield name, tensor
        if total.hexdigest() != self.data:
            raise self.schema.damaged(self.path)


def write_envelope(
    path: str | os.PathLike, schema: Schema, content: Any, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a content and tensors as one file, whole or not at all.

    >>> import tempfile
    >>> import torch
    >>> path, schema = tempfile.mkdtemp() + "/tiny", Schema("tiny", 1, "a tiny file", "write_envelope")
    >>> write_envelope(path, schema, {"n": 1}, {"x": torch.ones(2)})
    >>> envelope = read_envelope(path, schema)
    >>> envelope.content, dict(envelope.tensors())
    ({'n': 1}, {'x': tensor([1., 1.])})
    """
    dense = {
        name: tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        for name, tensor in (tensors or {}).items()
    }
    described = {name: (_kind(name, tensor), tensor.shape) for name, tensor in dense.items()}
    data = "" if schema.as_json else digest(raw_bytes(dense[name]) for name in sorted(dense))
    head = rendered(schema, content, described, data)
    with write_atomically(path) as aside:
        if schema.as_json:
            aside.write_bytes(head.encode())
            return
        try:
            write_safetensors(aside, dense, {_KEY: head})
        except SafetensorError as error:
            if "header too large" not in str(error):
                raise
            raise InputError(
                f"cannot save {schema.what}: its names, lists, dicts and strings take over {LARGEST_HEADER:,} "
                "bytes as JSON; keep long lists of numbers in tensors"
            ) from error


def read_envelope(path: str | os.PathLike, schema: Schema) -> Envelope:
    """Read what `write_envelope` wrote; a file that is foreign, of another version, damaged or edited is refused."""
    with reading(path, schema.what):
        if schema.as_json:
            head = read_text(path, schema.what).replace("\r\n", "\n")  # as some checkouts write line ends
            file, described, canonical = None, {}, True
        else:
            file = read_header(path, schema.what)
            head, described = file.metadata.get(_KEY, "{}"), file.entries
            canonical = len(file.metadata) == 1 and file.is_canonical()
        header = json_object(head)
        schema.check(path, header)
        content, data = header["content"], header.get("data", "")
        if not canonical or head != rendered(schema, content, described, data):
            raise schema.damaged(path)
    return Envelope(schema, path, content, data, file)


def schema_name(path: str | os.PathLike) -> Any:
    """The name of the schema of a safetensors file; None if the file has no envelope."""
    file = read_header(path)
    with reading(path, "a safetensors file"):
        return json_object(file.metadata.get(_KEY, "{}")).get("schema")


def rendered(schema: Schema, content: Any, described: Described, data: str) -> str:
    """The JSON of a file: all of it, or the metadata beside the tensors, whose bytes have the digest `data`."""
    header = {"schema": schema.name, "version": schema.version}
    header["digest"] = digest_of(schema, content, described, data)
    if schema.as_json:
        return json.dumps(header | {"content": content}, indent=1, allow_nan=False) + "\n"
    return _compact(header | {"content": content, "data": data})


def digest_of(schema: Schema, content: Any, described: Described | None = None, data: str = "") -> str:
    """The digest of a file: 64 hexadecimal digits that identify everything in it."""
    tensors = [[name, kind, list(shape)] for name, (kind, shape) in sorted((described or {}).items())]
    return digest([_compact([schema.name, schema.version, content, tensors, data])])


def digest(pieces: Iterable[str | bytes | memoryview]) -> str:
    """The SHA-256 of texts and bytes in sequence.

    >>> digest(["a", b"b"]) == digest(["ab"]), digest([])[:8]
    (True, 'e3b0c442')
    """
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece.encode("utf-8", "surrogatepass") if isinstance(piece, str) else piece)
    return total.hexdigest()


def file_digest(path: str | os.PathLike) -> str:
    """The SHA-256 of a whole file of any kind."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compact(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def _kind(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in _KINDS:
        raise InputError(f"{name} is {tensor.dtype}, which a file cannot hold; convert it first")
    return _KINDS[tensor.dtype]
