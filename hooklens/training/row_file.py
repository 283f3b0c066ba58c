"""A table that grows by one row a step, in a file that others read while it grows."""

import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hooklens.core.errors import FileRefused, InputError, Unavailable
from hooklens.core.files import reading

_WORD = np.dtype("<u4")


@dataclass(frozen=True)
class Rows:
    """The columns of a file of rows. A column has one number, or a fixed number of them, in each row."""

    steps: NDArray
    columns: Mapping[str, NDArray]
    notes: Mapping[str, Any] = field(default_factory=dict)

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

    def __init__(
        self,
        path: Path,
        widths: Mapping[str, int],
        *,
        keep: int = 0,
        notes: Mapping[str, Any] | None = None,
        at_least: int = 0,
    ):
        """Open the file for rows from step `keep` on; rows of earlier steps stay, later ones are cut off.

        Fewer than `at_least` intact rows of earlier steps are refused: some of them were lost.
        """
        self.path, self.widths = path, dict(widths)
        begin = _begin(self.widths, {} if notes is None else notes)
        resumes = keep > 0 and path.exists()
        self.n_rows = _rows_before(path, keep, begin) if resumes else 0
        if self.n_rows < at_least:
            raise lost_rows(path, self.n_rows, at_least)
        with _writing(path):
            self._file = open(path, "r+b" if resumes else "wb")  # noqa: SIM115  # closed by close()
            try:
                if resumes:
                    self._file.truncate(len(begin) + self.n_rows * _row_bytes(self.widths))
                    self._file.seek(0, os.SEEK_END)
                else:
                    self._file.write(begin)
                    self._file.flush()
            except OSError:
                with suppress(OSError):
                    self._file.close()
                raise

    def append(self, step: int, values: Sequence[Sequence[float | int] | NDArray]) -> None:
        """Write the row of one step, a sequence of values for each column in order."""
        row = np.concatenate([np.asarray(column, dtype="<f4").reshape(-1) for column in values])
        if len(row) != sum(self.widths.values()):
            raise InputError(f"a row of {self.path.name} has {sum(self.widths.values())} numbers, got {len(row)}")
        content = np.array([step], dtype="<u8").tobytes() + row.tobytes()
        with _writing(self.path):
            self._file.write(content + np.array([zlib.crc32(content)], dtype=_WORD).tobytes())
        self.n_rows += 1

    def flush(self, *, to_disk: bool = False) -> None:
        """Make the rows visible to readers; `to_disk` also survives a loss of power."""
        with _writing(self.path):
            self._file.flush()
            if to_disk:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is buffered and close the file."""
        with _writing(self.path):
            self._file.close()

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def lost_rows(path: Path, seen: int, needed: int) -> FileRefused:
    """The error for a file with fewer rows than were written before the state of the run."""
    return FileRefused(
        f"{path} lacks intact rows of steps that the run has taken ({seen:,} of {needed:,}); restore the file, or "
        "remove the folder and begin again"
    )


def read_rows(path: Path) -> Rows:
    """The whole rows of a file that `RowFile` writes or wrote. A row that was changed afterwards is refused."""
    with reading(path, "the record of a run"):
        header, raw = _read(path)
        widths = header["columns"]
        size = _row_bytes(widths)
        table = np.frombuffer(raw, dtype=np.uint8, count=len(raw) // size * size).reshape(-1, size)
        for i in range(len(table)):
            if not _intact(raw, i * size, size):
                raise FileRefused(f"{path} is damaged: row {i} is not what its checksum says")
    steps = np.ascontiguousarray(table[:, :8]).view("<u8")[:, 0].astype(np.int64)
    numbers = np.ascontiguousarray(table[:, 8:-4]).view("<f4")
    edges = np.cumsum([0, *widths.values()])
    columns = {
        name: numbers[:, edges[i]] if width == 1 else numbers[:, edges[i] : edges[i + 1]]
        for i, (name, width) in enumerate(widths.items())
    }
    return Rows(steps, columns, header["notes"])


def _rows_before(path: Path, step: int, begin: bytes) -> int:
    """How many intact rows of earlier steps there are. What follows them may be anything: it is written again."""
    with reading(path, "the record of a run"):
        header, raw = _read(path)
        if not path.read_bytes().startswith(begin):
            raise FileRefused(f"{path} has other columns than this run writes; choose another folder")
        size = _row_bytes(header["columns"])
        for start in range(0, len(raw) // size * size, size):
            here = int(np.frombuffer(raw, dtype="<u8", count=1, offset=start)[0])
            if here >= step or not _intact(raw, start, size):
                return start // size
    return len(raw) // size


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an error of the system, such as a full disk, into one that says which file could not be written."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise Unavailable(
            f"cannot write {str(path)!r}: {error.strerror or error}; {'free some space' if full else 'mend that'}, and "
            "the same call goes on from the last state"
        ) from error


def _begin(widths: Mapping[str, int], notes: Mapping[str, Any]) -> bytes:
    header = {"schema": "hooklens.rows", "version": 1, "columns": widths, "notes": notes}
    return json.dumps(header).encode() + b"\n"


def _row_bytes(widths: Mapping[str, int]) -> int:
    return 8 + 4 * sum(widths.values()) + 4


def _intact(raw: bytes, start: int, size: int) -> bool:
    stop = start + size - 4
    return zlib.crc32(raw[start:stop]) == int(np.frombuffer(raw, dtype=_WORD, count=1, offset=stop)[0])


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and all rows of a file."""
    with open(path, "rb") as file:
        header = json.loads(file.readline(2**24))
        if header.get("schema") != "hooklens.rows" or header.get("version") != 1:
            raise FileRefused(f"{path} is no record of a run that this hooklens reads")
        return header, file.read()
