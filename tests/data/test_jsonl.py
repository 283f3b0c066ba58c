"""Prompt files: read as they stand, refused with every bad line's number."""

import json

import pytest

from hooklens.core.errors import InputError
from hooklens.data.jsonl import read_pairs_file, read_texts_file

GOOD = {"clean": "a b", "corrupted": "a c", "answer": " d", "wrong_answer": " e"}


def write(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_pairs_and_their_groups(tmp_path):
    pairs = read_pairs_file(write(tmp_path, GOOD, "", {**GOOD, "answer": " ü", "group": 3}, {**GOOD, "group": 3}))
    assert len(pairs) == 3 and pairs.answer == [" d", " ü", " d"] and pairs.corrupted == ["a c"] * 3
    assert pairs.group_numbers().tolist() == [0, 1, 1]


def test_texts_with_labels_of_any_kind(tmp_path):
    texts = read_texts_file(write(tmp_path, {"text": "x", "label": True}, {"text": "y", "label": 2.5, "group": "g"}))
    assert texts.label == [True, 2.5] and texts.group == ["line 0", "given g"]


def test_every_bad_line_is_reported_with_its_number(tmp_path):
    path = write(
        tmp_path, GOOD, "{", "[1]", {"clean": "a"}, {**GOOD, "answer": 5}, {**GOOD, "anser": "x"}, {**GOOD, "clean": ""}
    )
    with pytest.raises(InputError) as raised:
        read_pairs_file(path)
    message = str(raised.value)
    assert "6 bad of 7 lines" in message
    for part in (
        "line 2: not JSON",
        "line 3: a JSON object is wanted, got '[1]'",
        "line 4: corrupted and answer and wrong_answer missing; it has 'clean'",
        "line 5: answer must be text, got 5",
        "line 6: unknown field 'anser'",
        "line 7: clean is empty",
    ):
        assert part in message


def test_many_bad_lines_are_counted(tmp_path):
    with pytest.raises(InputError, match="and 15 more"):
        read_pairs_file(write(tmp_path, *["nonsense"] * 25))


def test_files_that_hold_nothing_or_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="holds no line"):
        read_texts_file(write(tmp_path, "", "  "))
    with pytest.raises(InputError, match="cannot be read"):
        read_texts_file(tmp_path / "absent.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as a UTF-8"):
        read_pairs_file(tmp_path / "binary.jsonl")
