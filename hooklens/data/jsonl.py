"""Prompts of one's own from a JSONL file: one JSON object a line, every bad line reported with its number."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.errors import InputError

_REPORTED = 10  # bad lines that a message shows; the rest are counted


@dataclass(frozen=True)
class PromptPairs:
    """Clean and corrupted prompts with their next tokens, as texts or as ids. Pairs of one `group` share something."""

    clean: list[Any]
    corrupted: list[Any]
    answer: list[Any]
    wrong_answer: list[Any]
    group: list[str]

    def __len__(self) -> int:
        return len(self.clean)

    def group_numbers(self) -> Int[Tensor, "pair"]:
        """The group of each pair as a number."""
        return numbered(self.group)


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with a label each. Texts of one `group` share something and are never split between training and test."""

    text: list[str]
    label: list[str | int | float | bool]
    group: list[str]

    def __len__(self) -> int:
        return len(self.text)


def read_pairs_file(path: str | Path) -> PromptPairs:
    """Prompt pairs: lines with clean, corrupted, answer, wrong_answer and, where pairs share something, group.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
    >>> _ = path.write_text('{"clean": "a b", "corrupted": "a c", "answer": " d", "wrong_answer": " e"}')
    >>> read_pairs_file(path).answer
    [' d']
    """
    fields = dict.fromkeys(("clean", "corrupted", "answer", "wrong_answer"), str)
    rows = read_rows(path, fields, {"group": (str, int)})
    clean, corrupted, answer, wrong = ([row[name] for row in rows] for name in fields)
    return PromptPairs(clean, corrupted, answer, wrong, groups(rows))


def read_texts_file(path: str | Path) -> LabelledTexts:
    """Labelled texts: lines with text, label and, where texts share something, group."""
    rows = read_rows(path, {"text": str, "label": (str, int, float, bool)}, {"group": (str, int)})
    return LabelledTexts([row["text"] for row in rows], [row["label"] for row in rows], groups(rows))


def read_rows(path: str | Path, fields: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> list[dict]:
    """Every line's object, with these fields of these types. All bad lines are reported at once, by number."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a UTF-8 JSONL file: {error}") from error
    rows, bad = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        row, problem = _row(line, fields, optional or {})
        rows.append(row)
        if problem:
            bad.append(f"line {number}: {problem}")
    if bad:
        more = [f"and {len(bad) - _REPORTED} more"] if len(bad) > _REPORTED else []
        wanted = ", ".join(f'"{name}"' for name in fields)
        shown = "\n  ".join(bad[:_REPORTED] + more)
        raise InputError(
            f"{path} has {len(bad)} bad of {len(rows)} lines; each is a JSON object with {wanted}:\n  {shown}"
        )
    if not rows:
        raise InputError(f"{path} holds no line; each is a JSON object with {', '.join(fields)}")
    return rows


def groups(rows: list[dict]) -> list[str]:
    """Each row's group; a row that names none is one of its own."""
    return [f"given {row['group']}" if "group" in row else f"line {i}" for i, row in enumerate(rows)]


def numbered(group: list[str]) -> Int[Tensor, "pair"]:
    """Labels as numbers, in order of first appearance.

    >>> numbered(["x", "y", "x"]).tolist()
    [0, 1, 0]
    """
    order = {label: i for i, label in enumerate(dict.fromkeys(group))}
    return torch.tensor([order[label] for label in group])


def _row(line: str, fields: Mapping[str, Any], optional: Mapping[str, Any]) -> tuple[dict, str | None]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return {}, f"not JSON ({error}): {line[:60]!r}"
    if not isinstance(row, dict):
        return {}, f"a JSON object is wanted, got {line[:60]!r}"
    if missing := [name for name in fields if name not in row]:
        return row, f"{' and '.join(missing)} missing; it has {', '.join(map(repr, row)) or 'nothing'}"
    if unknown := [name for name in row if name not in fields and name not in optional]:
        return row, f"unknown field {unknown[0]!r}"
    for name, kinds in {**fields, **optional}.items():
        if name in row and not _is(row[name], kinds):
            return row, f"{name} must be {_words(kinds)}, got {row[name]!r:.60}"
        if isinstance(row.get(name), str) and not row[name]:
            return row, f"{name} is empty"
    return row, None


def _is(value: Any, kinds: Any) -> bool:
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    return type(value) in allowed  # True is no number here unless booleans are asked for


def _words(kinds: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return " or ".join(names[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
