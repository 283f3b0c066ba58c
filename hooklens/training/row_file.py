"""A table that grows by one row a step, in a file that others read while it grows."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hooklens.core.errors import FileRefused, InputError
from hooklens.core.files import reading

_WORD = np.dtype("<u4")


@dataclass(frozen=True)
class Rows:
    """The columns of a file of rows. A column is one number a row, or a vector of a fixed width."""

    steps: NDArray
    columns: Mapping[str, NDArray]

    def __getitem__(self, name: str) -> NDArray:
        return self.columns[name]


class RowFile:
    """Writes rows of float32 numbers, each with its step and a checksum, behind one line that names the columns.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "steps.rows"
    >>> with RowFile(path, {"loss": 1, "norms": 2}) as file:
    ...     file.append(0, [[0.5], [1.0, 2.0]])
    >>> rows = read_rows(path)
    >>> rows["loss"], rows["norms"]
    (array([0.5], dtype=float32), array([[1., 2.]], dtype=float32))

    A process that is killed leaves whole rows and at most a part of one, which readers leave out.
    """

    def __init__(self, path: Path, widths: Mapping[str, int], *, keep: int = 0):
        """Open the file for rows from step `keep` on; rows of earlier steps stay, later ones are cut off."""
        self.path, self.widths = path, dict(widths)
        begin = _begin(self.widths)
        kept = self._rows_before(keep) if keep and path.exists() else None
        self._file = open(path, "wb" if kept is None else "r+b")  # noqa: SIM115  # closed by close()
        if kept is None:
            self._file.write(begin)
            self._file.flush()
        else:
            self._file.truncate(len(begin) + kept * _row_bytes(self.widths))
            self._file.seek(0, os.SEEK_END)

    def _rows_before(self, step: int) -> int:
        rows = read_rows(self.path)
        if list(_widths(self.path)[0].items()) != list(self.widths.items()):
            raise FileRefused(f"{self.path} has other columns than this run writes; choose another folder")
        return int(np.searchsorted(rows.steps, step))

    def append(self, step: int, values: Sequence[Sequence[float] | NDArray]) -> None:
        """Write the row of one step, a sequence of values for each column in order."""
        row = np.concatenate([np.asarray(column, dtype="<f4").reshape(-1) for column in values])
        if len(row) != sum(self.widths.values()):
            raise InputError(f"a row of {self.path.name} has {sum(self.widths.values())} numbers, got {len(row)}")
        content = np.array([step], dtype="<u8").tobytes() + row.tobytes()
        self._file.write(content + np.array([zlib.crc32(content)], dtype=_WORD).tobytes())

    def flush(self, *, to_disk: bool = False) -> None:
        """Make the rows visible to readers; `to_disk` also survives a loss of power."""
        self._file.flush()
        if to_disk:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self._file.close()

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_rows(path: Path) -> Rows:
    """The whole rows of a file that `RowFile` writes or wrote. A row that was changed afterwards is refused."""
    with reading(path, "the record of a run"):
        widths, start = _widths(path)
        size = _row_bytes(widths)
        with open(path, "rb") as file:
            file.seek(start)
            raw = file.read()
        raw = raw[: len(raw) // size * size]
        table = np.frombuffer(raw, dtype=np.uint8).reshape(-1, size)
        sums = np.ascontiguousarray(table[:, -4:]).view(_WORD)[:, 0]
        content = size - 4
        wrong = [i for i in range(len(table)) if zlib.crc32(raw[i * size : i * size + content]) != sums[i]]
        if wrong:
            raise FileRefused(f"{path} is damaged: row {wrong[0]} is not what its checksum says")
    steps = np.ascontiguousarray(table[:, :8]).view("<u8")[:, 0].astype(np.int64)
    numbers = np.ascontiguousarray(table[:, 8:-4]).view("<f4")
    edges = np.cumsum([0, *widths.values()])
    columns = {
        name: numbers[:, edges[i]] if width == 1 else numbers[:, edges[i] : edges[i + 1]]
        for i, (name, width) in enumerate(widths.items())
    }
    return Rows(steps, columns)


def _begin(widths: Mapping[str, int]) -> bytes:
    return json.dumps({"schema": "hooklens.rows", "version": 1, "columns": widths}).encode() + b"\n"


def _row_bytes(widths: Mapping[str, int]) -> int:
    return 8 + 4 * sum(widths.values()) + 4


def _widths(path: Path) -> tuple[dict[str, int], int]:
    with open(path, "rb") as file:
        line = file.readline(2**20)
    header = json.loads(line)
    if header.get("schema") != "hooklens.rows" or header.get("version") != 1:
        raise FileRefused(f"{path} is no record of a run that this hooklens reads")
    return header["columns"], len(line)
