"""Prompts of one's own from a JSONL file: one JSON object a line, every bad line reported with its number."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.errors import ArgumentError, HooklensError, InputError, Refused
from hooklens.core.files import read_text, write_atomically
from hooklens.data.prompt_pairs import PromptPairs, numbered
from hooklens.data.prompts import common_ends
from hooklens.model.ids import show

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_LARGEST = 1 << 30  # bytes
_REPORTED = 10  # bad lines of which a message shows what is wrong; of the others it gives the numbers


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with a label each. Texts of one `group` share something and are never split between training and test."""

    text: list[str]
    label: list[str | int | float | bool]
    group: list[str]
    lines: Sequence[int] = ()

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
    lines = read_rows(path, fields, {"group": (str, int)})
    rows = list(lines.values())
    clean, corrupted, answer, wrong = ([row[name] for row in rows] for name in fields)
    return PromptPairs(
        clean, corrupted, answer=answer, wrong_answer=wrong, group=numbered(groups(rows)), columns={"line": list(lines)}
    )


def write_pairs_file(pairs: PromptPairs, path: str | Path) -> None:
    """Pairs of texts as lines that `read_pairs_file` reads, whole or not at all; other columns are left out.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
    >>> write_pairs_file(PromptPairs("a b", "a c", answer=" d", wrong_answer=" e", group=[3]), path)
    >>> path.read_text(encoding="utf-8")
    '{"clean": "a b", "corrupted": "a c", "answer": " d", "wrong_answer": " e", "group": 3}\\n'
    """
    fields = ("clean", "corrupted", "answer", "wrong_answer")
    columns = {name: getattr(pairs, name) for name in fields}
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
    """Labelled texts: lines with text, label and, where texts share something, group."""
    lines = read_rows(path, {"text": str, "label": (str, int, float, bool)}, {"group": (str, int)})
    rows = list(lines.values())
    return LabelledTexts([row["text"] for row in rows], [row["label"] for row in rows], groups(rows), list(lines))


def read_rows(
    path: str | Path, fields: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> dict[int, dict[str, Any]]:
    """Every line's object by its line number, with these fields of these types. All bad lines are reported at once."""
    text = read_text(path, "a JSONL file", encoding="utf-8-sig", largest=_LARGEST)
    rows, bad = {}, {}
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # splitlines also cuts where JSON may hold a character, as at U+2028
        if not line.strip():
            continue
        rows[number], problem = _row(line, fields, optional or {})
        if problem:
            bad[number] = problem
    if bad:
        wanted = ", ".join(f'"{name}"' for name in fields)
        raise _bad_lines(f"{path} has {len(bad)} bad of {len(rows)} lines; each is a JSON object with {wanted}", bad)
    if not rows:
        raise InputError(f"{path} holds no line; each is a JSON object with {', '.join(fields)}")
    return rows


def check_pairs(model: "HookedTransformer", pairs: PromptPairs, source: str, *, corrupted: bool = True) -> None:
    """Can the model use every pair of this file? All lines that it cannot are reported at once, before anything runs.

    With `corrupted`, each clean prompt must also differ from its corrupted one, and be as long.
    """
    bad = {}
    for line, i in zip(pairs.columns.get("line", range(1, len(pairs) + 1)), range(len(pairs)), strict=True):
        one = (pairs.clean[i], pairs.corrupted[i] if corrupted else None, pairs.answer[i], pairs.wrong_answer[i])
        if found := "; ".join(map(str, _unusable_pair(model, *one))):
            bad[line] = found
    if bad:
        raise _bad_lines(f"{source} has {len(bad)} of {len(pairs)} lines that this model cannot use", bad)


def check_pair(model: "HookedTransformer", pair: PromptPairs) -> None:
    """The same for one pair that was given by arguments."""
    found = list(_unusable_pair(model, pair.clean[0], pair.corrupted[0], pair.answer[0], pair.wrong_answer[0]))
    if len(found) > 1:
        raise Refused([("", error) for error in found])
    for error in found:
        raise error


def check_texts(model: "HookedTransformer", texts: LabelledTexts, source: str) -> None:
    """Can the model read every text of this file? All lines that it cannot read are reported at once."""
    bad = {
        line: str(found)
        for line, text in zip(texts.lines or range(1, len(texts) + 1), texts.text, strict=True)
        if isinstance(found := _tokens(model, text), HooklensError)
    }
    if bad:
        raise _bad_lines(f"{source} has {len(bad)} of {len(texts)} lines that this model cannot use", bad)


def groups(rows: list[dict]) -> list[str]:
    """Each row's group; a row that names none is one of its own."""
    return [f"given {row['group']}" if "group" in row else f"line {i}" for i, row in enumerate(rows)]


def _unusable_pair(
    model: "HookedTransformer", clean: str, corrupted: str | None, answer: str, wrong_answer: str
) -> Iterator[ArgumentError]:
    """What keeps the model from using a pair, each thing on its own."""
    prompts = {"clean": clean} | ({} if corrupted is None else {"corrupted": corrupted})
    rows = {name: _tokens(model, text) for name, text in prompts.items()}
    answers = {name: _single(model, text) for name, text in (("answer", answer), ("wrong_answer", wrong_answer))}
    for name, found in (rows | answers).items():
        if isinstance(found, HooklensError):
            yield ArgumentError(f"{{{name}}}: {{0}}", found)
    one, other = answers.values()
    if isinstance(one, int) and one == other:
        yield ArgumentError("{answer} and {wrong_answer} are the same token {0!r}, so their difference is 0", answer)
    a, b = rows["clean"], rows.get("corrupted")
    if isinstance(a, Tensor) and isinstance(b, Tensor) and (len(a) != len(b) or torch.equal(a, b)):
        at = common_ends(a, b)[0]
        parts = (repr(show(model, row[at : at + 1])[0]) if at < len(row) else "(end)" for row in (a, b))
        if len(a) == len(b):
            yield ArgumentError("{clean} and {corrupted} are the same; change one word of {corrupted}")
            return
        yield ArgumentError(
            "{clean} has {0} tokens and {corrupted} {1} (they part at {2}: {3}); re-word one of them",
            *(len(a), len(b), at, " | ".join(parts)),
        )


def _tokens(model: "HookedTransformer", text: str) -> Int[Tensor, "pos"] | HooklensError:
    try:
        ids = model.to_tokens(text)[0]
    except HooklensError as error:
        return error
    if len(ids) > model.cfg.n_ctx:
        return InputError(f"{len(ids)} tokens do not fit the model's {model.cfg.n_ctx}; shorten it")
    return ids


def _single(model: "HookedTransformer", text: str) -> int | HooklensError:
    try:
        return model.to_single_token(text)
    except HooklensError as error:
        return error


def _bad_lines(headline: str, bad: Mapping[int, str]) -> InputError:
    """The first of them with what is wrong, all others by number."""
    shown = [f"line {number}: {problem}" for number, problem in list(bad.items())[:_REPORTED]]
    if rest := list(bad)[_REPORTED:]:
        shown.append(f"and {'line' if len(rest) == 1 else 'lines'} {_ranges(rest)}")
    return InputError("\n  ".join([f"{headline}:", *shown]))


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in order, neighbours drawn together.

    >>> _ranges([3, 4, 5, 9, 11, 12])
    '3 to 5, 9, 11, 12'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _row(line: str, fields: Mapping[str, Any], optional: Mapping[str, Any]) -> tuple[dict, str | None]:
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


def _wrong(name: str, value: Any, kinds: Any) -> str | None:
    """What is wrong with a field's value."""
    if not _is(value, kinds) or (isinstance(value, float) and not math.isfinite(value)):
        return f"{name} must be {_words(kinds)}, got {value!r:.60}"
    if not isinstance(value, str):
        return None
    if not value:
        return f"{name} is empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{name} holds half of a surrogate pair, which is no character: {value!r:.60}"
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
    raise ValueError(f"{word} is no JSON number")


def _is(value: Any, kinds: Any) -> bool:
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    return type(value) in allowed  # True is no number here unless booleans are asked for


def _words(kinds: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return " or ".join(names[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
