"""Prompt files: read as they stand, refused with every bad line's number."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.core.errors import FileRefused, InputError
from hooklens.data.jsonl import check_pairs, check_texts, read_pairs_file, read_texts_file
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.testing import tiny_model

GOOD = {"clean": "a b", "corrupted": "a c", "answer": " d", "wrong_answer": " e"}


def write(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_pairs_and_their_groups(tmp_path):
    pairs = read_pairs_file(write(tmp_path, GOOD, "", {**GOOD, "answer": " ü", "group": 3}, {**GOOD, "group": 3}))
    assert len(pairs) == 3 and pairs.answer == [" d", " ü", " d"] and pairs.corrupted == ["a c"] * 3
    assert pairs.group.tolist() == [0, 1, 1]


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


def test_past_the_tenth_bad_line_the_numbers_are_still_given(tmp_path):
    """They were only counted: "and 15 more"."""
    lines = ["nonsense"] * 25 + [json.dumps(GOOD), "nonsense"]
    with pytest.raises(InputError, match=r"line 10: not JSON.*\n  and lines 11 to 25, 27$"):
        read_pairs_file(write(tmp_path, *lines))


def test_a_line_that_holds_an_odd_separator_is_one_line(tmp_path):
    """str.splitlines cuts at eight characters that JSON strings may hold as they are."""
    odd = [{**GOOD, "clean": f"a{separator}b"} for separator in "\u2028\u2029\x85"]
    path = tmp_path / "odd.jsonl"
    path.write_text(
        "\r\n".join(json.dumps(row, ensure_ascii=False) for row in odd) + "\r\n", encoding="utf-8-sig", newline=""
    )
    assert read_pairs_file(path).clean == [row["clean"] for row in odd]
    bad = write(tmp_path, json.dumps(odd[0], ensure_ascii=False), "nonsense")
    with pytest.raises(InputError, match=r"1 bad of 2 lines.*\n  line 2: not JSON"):
        read_pairs_file(bad)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a", "label": NaN}', "NaN is not a JSON number"),
        ('{"text": "a", "label": -Infinity}', "-Infinity is not a JSON number"),
        ('{"text": "a", "label": 1e999}', "label must be .*, got inf"),
        ('{"text": "a", "label": 1, "text": "b"}', "'text' given twice"),
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "not JSON"),
        ('{"text": "a", "label": ' + "[" * 100_000, "not JSON"),
        (r'{"text": "\ud800", "label": 1}', "half of a surrogate pair"),
    ],
)
def test_what_python_would_read_and_json_does_not_mean_is_refused(tmp_path, line, says):
    """A NaN was a label of its own each time, and of two texts the last one won without a word."""
    with pytest.raises(InputError, match=f"1 bad of 2 lines(.|\n)*line 2: .*{says}"):
        read_texts_file(write(tmp_path, {"text": "x", "label": 1}, line))


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
PAIRS = st.fixed_dictionaries(dict.fromkeys(GOOD, WORDS), optional={"group": WORDS | st.integers()})


@settings(max_examples=30, deadline=None)
@given(st.lists(PAIRS, min_size=1), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_any_objects_are_read_back(tmp_path_factory, rows, ascii_only, end):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows), encoding="utf-8", newline="")
    pairs = read_pairs_file(path)
    assert (pairs.clean, pairs.corrupted) == ([row["clean"] for row in rows], [row["corrupted"] for row in rows])
    assert (pairs.answer, pairs.wrong_answer) == ([r["answer"] for r in rows], [r["wrong_answer"] for r in rows])
    assert list(pairs["line"]) == [1 + i * end.count("\n") for i in range(len(rows))]
    named = [row.get("group", i) for i, row in enumerate(rows)]
    together = [str(a) == str(b) and ("group" in r) == ("group" in s)
                for a, r in zip(named, rows, strict=True) for b, s in zip(named, rows, strict=True)]  # fmt: skip
    assert [a == b for a in pairs.group for b in pairs.group] == together


BAD = st.sampled_from(["{", "[1]", "null", "3", '{"clean": "a"}', json.dumps({**GOOD, "answer": None}), '"\u2028"'])


@settings(max_examples=30, deadline=None)
@given(st.lists(BAD | st.just(json.dumps(GOOD)) | st.just(" "), min_size=1, max_size=40))
def test_any_set_of_bad_lines_is_reported_whole(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    wrong = [i for i, line in enumerate(lines, 1) if line != json.dumps(GOOD) and line.strip()]
    if not wrong and all(not line.strip() for line in lines):
        return
    if not wrong:
        read_pairs_file(path)
        return
    with pytest.raises(InputError) as raised:
        read_pairs_file(path)
    told = []
    for line in str(raised.value).split("\n  ")[1:]:
        if line.startswith("line "):
            told.append(int(line[5 : line.index(":")]))
        else:
            for part in line.removeprefix("and lines ").removeprefix("and line ").split(", "):
                first, _, last = part.partition(" to ")
                told += range(int(first), int(last or first) + 1)
    assert told == wrong


def test_files_that_hold_nothing_or_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="has no lines"):
        read_texts_file(write(tmp_path, "", "  "))
    with pytest.raises(InputError, match=r"absent.jsonl': there is no such file"):
        read_texts_file(tmp_path / "absent.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileRefused, match="is not UTF-8 text"):
        read_pairs_file(tmp_path / "binary.jsonl")


def test_every_line_that_the_model_cannot_use_is_reported(tmp_path):
    """One error for the first of them, without file or number, after the others had run."""
    model = tiny_model(d_vocab=20, n_ctx=5)
    model.tokenizer = tiny_tokenizer("When ĠMary ĠJohn Ġgave Ġto")
    good = {"clean": "When Mary gave", "corrupted": "When John gave", "answer": " Mary", "wrong_answer": " John"}
    lines = [
        good,
        {**good, "answer": " Mary John", "wrong_answer": " zebra"},
        "",
        {**good, "corrupted": "When John John gave"},
        {**good, "answer": " John"},
        {**good, "corrupted": good["clean"]},
        {**good, "clean": "When" + " Mary" * 9},
        {**good, "clean": "When Anna gave"},
    ]
    path = write(tmp_path, *lines)
    pairs = read_pairs_file(path)
    with pytest.raises(InputError) as raised:
        check_pairs(model, pairs, str(path))
    headline, *told = str(raised.value).split("\n  ")
    assert headline == f"{path} has 6 of 7 lines that this model cannot use:"
    assert [line.split(":")[0] for line in told] == [f"line {i}" for i in (2, 4, 5, 6, 7, 8)]
    assert "answer: ' Mary John' is 2 tokens" in told[0] and "; wrong_answer: " in told[0] and "zebra" in told[0]
    assert "clean has 3 tokens and corrupted 4 (first difference at 1: ' Mary' | ' John')" in told[1]
    assert "same token ' John'" in told[2] and "clean and corrupted are the same" in told[3]
    assert "10 tokens do not fit the model's 5" in told[4] and "7 tokens do not fit" in told[5]
    with pytest.raises(InputError, match="has 4 of 7 lines"):
        check_pairs(model, pairs, str(path), corrupted=False)
    texts = read_texts_file(write(tmp_path, {"text": "When", "label": 1}, {"text": "When" + " Mary" * 9, "label": 2}))
    with pytest.raises(InputError, match=r"1 of 2 lines that this model cannot use:\n  line 2: 10 tokens do not fit"):
        check_texts(model, texts, "texts.jsonl")


def test_an_object_of_100_000_keys_takes_no_quadratic_time_nor_a_message_of_its_size(tmp_path):
    began = time.process_time()
    for names in (range(100_000), [*range(50_000), *range(50_000)]):
        path = tmp_path / "wide.jsonl"
        path.write_text("{" + ",".join(f'"k{i}":1' for i in names) + "}")
        with pytest.raises(InputError) as caught:
            read_pairs_file(path)
        assert len(str(caught.value)) < 1000
    assert time.process_time() - began < 5
