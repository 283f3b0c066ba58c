"""Prompts in a JSONL file, one JSON object per line; every bad line is reported with its number."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.errors import ArgumentError, HooklensError, InputError, Refused
from hooklens.core.files import read_text, write_atomically
from hooklens.data.prompt_pairs import PromptPairs, numbered
from hooklens.data.prompts import first_difference
from hooklens.model.transformer import HookedTransformer

Kinds = tuple[type, ...]
_LARGEST = 1 << 30  # bytes
_REPORTED = 10  # number of bad lines that a message explains; the others are listed by number
_FIELDS = ("clean", "corrupted", "answer", "wrong_answer")
_OPTIONAL: dict[str, Kinds] = {"group": (str, int)}
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with labels. Texts of one `group` share something and are never split between training and test."""

    text: list[str]
    label: list[str | int | float | bool]
    group: list[str]
    lines: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.text)


def read_pairs_file(path: str | Path) -> PromptPairs:
    """Read prompt pairs: lines with clean, corrupted, answer, wrong_answer and, if pairs share something, group.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
    >>> _ = path.write_text('{"clean": "a b", "corrupted": "a c", "answer": " d", "wrong_answer": " e"}')
    >>> read_pairs_file(path).answer
    [' d']
    """
    lines = read_rows(path, dict.fromkeys(_FIELDS, (str,)), _OPTIONAL)
    rows = list(lines.values())
    clean, corrupted, answer, wrong = ([row[name] for row in rows] for name in _FIELDS)
    return PromptPairs(
        clean, corrupted, answer=answer, wrong_answer=wrong, group=numbered(groups(rows)), columns={"line": list(lines)}
    )


def write_pairs_file(pairs: PromptPairs, path: str | Path) -> None:
    """Write pairs of texts as lines that `read_pairs_file` reads, atomically. Other columns are not written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
    >>> write_pairs_file(PromptPairs("a b", "a c", answer=" d", wrong_answer=" e", group=[3]), path)
    >>> path.read_text(encoding="utf-8")
    '{"clean": "a b", "corrupted": "a c", "answer": " d", "wrong_answer": " e", "group": 3}\\n'
    """
    if pairs.metric is not None:
        raise InputError(
            "a file of pairs holds texts and answers, and these pairs have a metric, which would be lost; save them "
            "with PromptPairs.save, or leave the metric out"
        )
    columns = {name: getattr(pairs, name) for name in _FIELDS}
    for name, column in columns.items():
        if column is None or not all(isinstance(value, str) for value in column):
            seen = "none" if column is None else f"{next(v for v in column if not isinstance(v, str))!r:.60}"
            raise InputError(f"a file of pairs holds texts, and these pairs have as {name}: {seen}")
    if pairs.group is not None:
        columns["group"] = pairs.group.tolist()
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    with write_atomically(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_texts_file(path: str | Path) -> LabelledTexts:
    """Read labelled texts: lines with text, label and, if texts share something, group."""
    lines = read_rows(path, {"text": (str,), "label": tuple(_WORDS)}, _OPTIONAL)
    rows = list(lines.values())
    return LabelledTexts([row["text"] for row in rows], [row["label"] for row in rows], groups(rows), list(lines))


def read_rows(
    path: str | Path, fields: Mapping[str, Kinds], optional: Mapping[str, Kinds] | None = None
) -> dict[int, dict[str, Any]]:
    """Read the object of each line, by line number, and check its fields. All bad lines are reported at once."""
    text = read_text(path, "a JSONL file", encoding="utf-8-sig", largest=_LARGEST)
    rows, bad = {}, {}
    # not splitlines, which also splits at characters that JSON texts may contain, such as U+2028
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        rows[number], problem = _row(line, fields, optional or {})
        if problem:
            bad[number] = problem
    if bad:
        wanted = ", ".join(f'"{name}"' for name in fields)
        raise _bad_lines(f"{path} has {len(bad)} bad of {len(rows)} lines; each is a JSON object with {wanted}", bad)
    if not rows:
        raise InputError(f"{path} has no lines; each line is a JSON object with {', '.join(fields)}")
    return rows


def check_pairs(model: HookedTransformer, pairs: PromptPairs, source: str, *, corrupted: bool = True) -> None:
    """Raise unless the model can use every pair of this file; reports all unusable lines, before anything runs.

    With `corrupted`, each clean prompt must also differ from its corrupted one and have the same length.
    """
    lines = pairs.columns.get("line", range(1, len(pairs) + 1))
    problems = ("; ".join(map(str, _problems(model, row))) for row in _texts_of(pairs, corrupted=corrupted))
    bad = {line: problem for line, problem in zip(lines, problems, strict=True) if problem}
    _check_lines(bad, len(pairs), source)


def check_pair(model: HookedTransformer, pair: PromptPairs) -> None:
    """Raise unless the model can use this pair, which was given by arguments."""
    (row,) = _texts_of(pair)
    if errors := [("", error) for error in _problems(model, row)]:
        raise Refused(errors)


def check_texts(model: HookedTransformer, texts: LabelledTexts, source: str) -> None:
    """Raise unless the model can read every text of this file; reports all unreadable lines."""
    lines = texts.lines or range(1, len(texts) + 1)
    read = {line: _tokens(model, text) for line, text in zip(lines, texts.text, strict=True)}
    bad = {line: str(error) for line, error in read.items() if isinstance(error, HooklensError)}
    _check_lines(bad, len(texts), source)


def groups(rows: list[dict]) -> list[str]:
    """The group of each row; a row without one is a group of its own."""
    return [f"given {row['group']}" if "group" in row else f"line {i}" for i, row in enumerate(rows)]


def _check_lines(bad: Mapping[int, str], n: int, source: str) -> None:
    if bad:
        raise _bad_lines(f"{source} has {len(bad)} of {n} lines that this model cannot use", bad)


def _texts_of(pairs: PromptPairs, *, corrupted: bool = True) -> Iterator[dict[str, str]]:
    names = [name for name in _FIELDS if corrupted or name != "corrupted"]
    for row in zip(*(getattr(pairs, name) for name in names), strict=True):
        yield dict(zip(names, row, strict=True))


def _problems(model: HookedTransformer, row: dict[str, str]) -> Iterator[ArgumentError]:
    """The reasons why the model cannot use a pair, one by one."""
    read = {name: (_single if "answer" in name else _tokens)(model, text) for name, text in row.items()}
    for name, value in read.items():
        if isinstance(value, HooklensError):
            yield ArgumentError(f"{{{name}}}: {{0}}", value)
    if isinstance(read["answer"], int) and read["answer"] == read["wrong_answer"]:
        same = "{answer} and {wrong_answer} are the same token {0!r}, so their difference is 0"
        yield ArgumentError(same, row["answer"])
    a, b = read["clean"], read.get("corrupted")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return
    if torch.equal(a, b):
        yield ArgumentError("{clean} and {corrupted} are the same; change one word of {corrupted}")
    elif len(a) != len(b):
        yield ArgumentError(
            "{clean} has {0} tokens and {corrupted} {1} (first difference at {2}); re-word one of them",
            *(len(a), len(b), first_difference(model, a, b)),
        )


def _tokens(model: HookedTransformer, text: str) -> Int[Tensor, "pos"] | HooklensError:
    ids = _or_error(lambda: model.to_tokens(text)[0])
    if isinstance(ids, Tensor) and len(ids) > model.cfg.n_ctx:
        return InputError(f"{len(ids)} tokens do not fit the model's {model.cfg.n_ctx}; shorten it")
    return ids


def _single(model: HookedTransformer, text: str) -> int | HooklensError:
    return _or_error(lambda: model.to_single_token(text))


def _or_error(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except HooklensError as error:
        return error


def _bad_lines(headline: str, bad: Mapping[int, str]) -> InputError:
    """An error that explains the first bad lines and lists the others by number."""
    shown = [f"line {number}: {problem}" for number, problem in list(bad.items())[:_REPORTED]]
    if rest := list(bad)[_REPORTED:]:
        shown.append(f"and {'line' if len(rest) == 1 else 'lines'} {_ranges(rest)}")
    return InputError("\n  ".join([f"{headline}:", *shown]))


def _ranges(numbers: Sequence[int]) -> str:
    """Format increasing numbers, with consecutive ones as a range.

    >>> _ranges([3, 4, 5, 9, 11, 12])
    '3 to 5, 9, 11, 12'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(shown)


def _row(line: str, fields: Mapping[str, Kinds], optional: Mapping[str, Kinds]) -> tuple[dict, str | None]:
    try:
        row = json.loads(line, parse_constant=_no_number, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON ({error}): {line[:60]!r}"
    if not isinstance(row, dict):
        return {}, f"a JSON object is wanted, got {line[:60]!r}"
    if missing := [name for name in fields if name not in row]:
        return row, f"{' and '.join(missing)} missing; it has {_named(row) or 'nothing'}"
    if unknown := [name for name in row if name not in fields and name not in optional]:
        return row, f"unknown field {unknown[0]!r:.60}"
    problems = (_wrong(name, row[name], kinds) for name, kinds in {**fields, **optional}.items() if name in row)
    return row, "; ".join(filter(None, problems)) or None


def _wrong(name: str, value: Any, kinds: Kinds) -> str | None:
    """The problem with the value of a field, if there is one."""
    # not isinstance, for which True is a whole number
    if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
        return f"{name} must be {' or '.join(_WORDS[kind] for kind in kinds)}, got {value!r:.60}"
    if not isinstance(value, str):
        return None
    if not value:
        return f"{name} is empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{name} contains half of a surrogate pair, which is not a character: {value!r:.60}"
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
        raise ValueError(f"{_named(twice)} given twice")
    return row


def _named(names: Iterable[str]) -> str:
    """The first few names."""
    shown = [f"{name!r:.60}" for name in itertools.islice(names, _REPORTED + 1)]
    return ", ".join(shown[:_REPORTED] + (["..."] if len(shown) > _REPORTED else []))


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")
