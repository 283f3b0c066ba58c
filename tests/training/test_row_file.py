"""Rows that are cut off are left out, changed ones are refused."""

import numpy as np
import pytest

from hooklens.core.errors import FileRefused
from hooklens.training.row_file import RowFile, read_rows


def written(path, n=5):
    with RowFile(path, {"loss": 1, "norms": 2}) as file:
        for step in range(n):
            file.append(step, [[step / 2], [step, -step]])
    return path


def test_every_cut_leaves_the_whole_rows_before_it(tmp_path):
    path = written(tmp_path / "rows")
    whole = path.read_bytes()
    begin = whole.index(b"\n") + 1
    size = (len(whole) - begin) // 5
    for cut in range(begin, len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert read_rows(path).steps.tolist() == list(range((cut - begin) // size))


def test_a_resumed_file_equals_one_that_was_written_at_once(tmp_path):
    once, resumed = written(tmp_path / "once"), written(tmp_path / "resumed")
    with open(resumed, "ab") as file:
        file.write(b"half a row")
    with RowFile(resumed, {"loss": 1, "norms": 2}, keep=3) as file:
        for step in (3, 4):
            file.append(step, [[step / 2], [step, -step]])
    assert resumed.read_bytes() == once.read_bytes()


def test_a_changed_bit_is_noticed(tmp_path):
    path = written(tmp_path / "rows")
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FileRefused, match="row 4 is not what its checksum says"):
        read_rows(path)


def test_rows_are_readable_while_they_are_written(tmp_path):
    with RowFile(tmp_path / "rows", {"loss": 1}) as file:
        for step in range(3):
            file.append(step, [[step]])
            file.flush()
            assert np.array_equal(read_rows(tmp_path / "rows")["loss"], np.arange(step + 1))


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[1]\n", b"\xff\xfe\n", b'{"schema": "hooklens.rows"}\n'])
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "rows").write_bytes(content)
    with pytest.raises(FileRefused):
        read_rows(tmp_path / "rows")
