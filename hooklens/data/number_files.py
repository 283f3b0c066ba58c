"""Files of numbers with a header row in place of our generators: regression prompts, and triples (a, b, c)."""

import csv
import math
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import path_of, seed_number, seeded, whole
from hooklens.core.envelope import digest
from hooklens.core.errors import InputError
from hooklens.core.files import reading
from hooklens.core.fingerprint import raw_bytes
from hooklens.data.batches import Batch, TrainingData, epoch_rows, share
from hooklens.data.modular import SIGNS, Modular, check_fraction, share_of
from hooklens.data.regression import regression_tokens

_TRIPLE = ["a", "b", "c"]
_LARGEST = 2**20  # of numbers in triples: a vocabulary of that size fits no memory of training
_FLOAT32 = torch.finfo(torch.float32).max


class _ByContent:
    """Data of a file: equal if their identity is, which has a checksum of the numbers."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.identity() == self.identity()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(tuple(self.identity().items()))  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class RegressionFile(_ByContent, TrainingData):
    """Regression prompts of a file, as tokens (x_i, y_i) and a query (x, 0); a share of the prompts is held out.

    `x` and `y` are the numbers of the file, with the query as the last point of every prompt.
    """

    name: str
    x: Float[Tensor, "prompt point d"] = field(repr=False)
    y: Float[Tensor, "prompt point"] = field(repr=False)
    held_out_share: float
    seed: int

    @property
    def d(self) -> int:
        """The dimensions of x."""
        return self.x.shape[2]

    @property
    def d_in(self) -> int:
        """The length of a token's vector."""
        return self.d + 1

    @property
    def points(self) -> range:
        """The number of examples in a context, as a range of one, as generated tasks have it."""
        k = self.x.shape[1] - 1
        return range(k, k + 1)

    @cached_property
    def split(self) -> tuple[Int[Tensor, "trained"], Int[Tensor, "kept"]]:
        """Which prompts are for training, and which are held out: at least one of each."""
        n = len(self.x)
        n_held_out = min(n - 1, max(1, round(n * self.held_out_share)))
        order = torch.randperm(n, generator=seeded(self.seed))
        return order[n_held_out:], order[:n_held_out]

    def tokens(self, x: Float[Tensor, "task point d"], y: Float[Tensor, "task point"]) -> Batch:
        """The batch that shows these points."""
        return regression_tokens(x, y)

    def batch(self, step: int, size: int) -> Batch:
        """`size` prompts for training; all of them in every step if there are no more than `size`."""
        train, _ = self.split
        rows = train if size >= len(train) else train[epoch_rows(step, size, len(train), self.seed)]
        return self.tokens(self.x[rows], self.y[rows])

    def held_out(self, size: int) -> Iterator[Batch]:
        """The held-out prompts."""
        for rows in self.split[1].split(size):
            yield self.tokens(self.x[rows], self.y[rows])

    def description(self) -> str:
        """What there is to learn."""
        train, kept = self.split
        return (
            f"the answers of the {len(train)} regression prompts in {self.name} that are not held out ({len(kept)} "
            f"are), of {self.points[0]} examples in {self.d} dimensions each"
        )

    def identity(self) -> dict[str, Any]:
        """What identifies the data."""
        return {
            "task": "regression prompts",
            "d": self.d,
            "n_points": self.points[0],
            "prompts": fingerprint(self.x, self.y),
            "held_out": self.held_out_share,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class ModularTriples(_ByContent, Modular):
    """Triples (a, b, c) of a file, as prompts "a b =" with the answer c.

    `operation` is "+", "-" or "x" if all triples agree with it modulo `p`, else "table": what the file says.
    """

    name: str
    triples: Int[Tensor, "pair 3"] = field(repr=False)

    @cached_property
    def pairs(self) -> tuple[Int[Tensor, "train_pair 2"], Int[Tensor, "held_out_pair 2"]]:
        """The pairs (a, b) of training and the held-out ones: together those of the file, each once."""
        order = torch.randperm(len(self.triples), generator=seeded(self.seed))
        pairs = self.triples[order, :2]
        n = share_of(len(pairs), self.fraction)
        return pairs[:n], pairs[n:]

    @cached_property
    def table(self) -> Int[Tensor, "a b"]:
        """The answer to every pair; refused if the file lacks some."""
        numbers = torch.arange(self.p)
        return self.answers(torch.cartesian_prod(numbers, numbers)).view(self.p, self.p)

    @cached_property
    def _sorted(self) -> tuple[Int[Tensor, "pair"], Int[Tensor, "pair"]]:
        keys, order = (self.triples[:, 0] * self.p + self.triples[:, 1]).sort()
        return keys, self.triples[order, 2]

    def answers(self, pairs: Int[Tensor, "some 2"]) -> Int[Tensor, "some"]:
        """The file's c for each pair; pairs that it does not have are refused."""
        keys, answers = self._sorted
        asked = pairs[:, 0] * self.p + pairs[:, 1]
        at = torch.searchsorted(keys, asked).clamp_max(len(keys) - 1)
        if not bool((keys[at] == asked).all()):
            a, b = pairs[keys[at] != asked][0].tolist()
            raise InputError(f"{self.name} has no triple for the pair ({a}, {b}); ask for pairs of data.pairs")
        return answers[at]

    def description(self) -> str:
        """What there is to learn."""
        rule = "a table" if self.operation == "table" else f"a {self.operation} b modulo {self.p}"
        return (
            f"the triples of {self.name}, {rule}, from {self.fraction:.0%} of its {len(self.triples)} pairs of the "
            f"numbers 0 to {self.p - 1}"
        )

    def identity(self) -> dict[str, Any]:
        """What identifies the data."""
        return super().identity() | {"task": "modular triples", "triples": fingerprint(self.triples)}


def regression_prompts(source: str | os.PathLike, *, held_out: float = 0.1, seed: int = 0) -> RegressionFile:
    """Regression prompts from a comma-separated file with the header prompt, x1 to xd, y.

    A row is one point. The rows of a prompt stand together under one name in the column prompt, all prompts have the
    same number of rows, and the last row is the query, whose y is the answer to predict.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "prompts.csv"
    >>> rows = [f"{prompt},{x},{prompt * x}" for prompt in (1, 2, 3) for x in (0.5, 1.0, 2.0)]
    >>> _ = path.write_text("\\n".join(["prompt,x1,y", *rows]))
    >>> data = regression_prompts(path)
    >>> data.d, data.x.shape, next(data.held_out(1)).inputs[0].tolist()
    (1, torch.Size([3, 3, 1]), [[0.5, 1.5], [1.0, 3.0], [2.0, 0.0]])
    """
    path, held_out = path_of(source, "source"), share("held_out", held_out, "the prompts")
    seed_number(seed)
    numbers, names, lengths, last = array("d"), dict[str, int](), list[int](), None
    rows = _rows(path, "regression prompts", _check_prompt_header)
    width = len(next(rows)[1])
    for line, row in rows:
        values = [_number(path, line, text) for text in row[1:]]
        if row[0] == last:
            lengths[-1] += 1
        elif row[0] in names:
            _refuse(path, line, f"prompt {row[0]!r:.60} began at line {names[row[0]]}; its rows stand together")
        else:
            _check_length(path, lengths, names, line)
            names[row[0]] = line
            lengths.append(1)
        last = row[0]
        numbers.extend(values)
    if len(lengths) < 2:
        raise InputError(f"{path} has {len(lengths)} prompts; at least 2 are needed, one of them held out")
    _check_length(path, lengths, names, line)
    table = torch.frombuffer(numbers, dtype=torch.float64).float().view(len(lengths), lengths[0], width - 1)
    x, y = table[..., :-1].contiguous(), table[..., -1].contiguous()
    return RegressionFile(path.name, x, y, held_out, seed=seed)


def modular_triples(
    source: str | os.PathLike, *, p: int | None = None, fraction: float = 0.3, seed: int = 0
) -> ModularTriples:
    """Triples for modular addition, or any other table, from a comma-separated file with the header a, b, c.

    All numbers are from 0 to p - 1 (p None: one more than the largest number of the file). `fraction` is the share of
    the file's pairs for training; the others are held out.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "triples.csv"
    >>> _ = path.write_text("\\n".join(["a,b,c", *(f"{a},{b},{(a + b) % 5}" for a in range(5) for b in range(5))]))
    >>> data = modular_triples(path, p=5, fraction=0.8)
    >>> data.operation, [len(pairs) for pairs in data.pairs], data.d_vocab
    ('+', [20, 5], 6)
    """
    path, bound = path_of(source, "source"), _LARGEST if p is None else whole("p", p, 2)
    seed_number(seed)
    numbers, seen = array("q"), dict[tuple[int, int], int]()
    rows = _rows(path, "triples", _check_triple_header)
    next(rows)
    for line, row in rows:
        a, b, c = (_residue(path, line, text, bound) for text in row)
        if (a, b) in seen:
            _refuse(path, line, f"the pair ({a}, {b}) was given at line {seen[a, b]}; give each pair once")
        seen[a, b] = line
        numbers.extend((a, b, c))
    if not seen:
        raise InputError(f"{path} has a header and no triples; each line is a,b,c")
    triples = torch.frombuffer(numbers, dtype=torch.int64).clone().view(-1, 3)
    p = max(2, int(triples.max()) + 1) if p is None else p
    share_of_pairs = check_fraction(fraction, len(triples))
    return ModularTriples(
        p=p,
        operation=operation_of(triples, p),
        fraction=share_of_pairs,
        seed=seed,
        name=path.name,
        triples=triples,
    )


def operation_of(triples: Int[Tensor, "pair 3"], p: int) -> str:
    """The operation modulo p with which all triples agree, "table" if there is none.

    >>> operation_of(torch.tensor([[2, 3, 0], [1, 1, 2]]), 5), operation_of(torch.tensor([[2, 3, 4]]), 5)
    ('+', '-')
    """
    a, b, c = triples.unbind(1)
    agreeing = (sign for sign, combine in SIGNS.items() if torch.equal(combine(a, b) % p, c))
    return next(agreeing, "table")


def task_of_file(path: str | os.PathLike) -> str:
    """The task of `hl.data` that reads this file, by its first line: numbers with a known header, else a text.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "triples.csv"
    >>> _ = path.write_text("a,b,c\\n1,2,3\\n")
    >>> task_of_file(path)
    'modular_triples'
    """
    with reading(path, "a file to train on"), open(path, encoding="utf-8-sig", errors="replace") as file:
        first = file.readline(10_000)
    # Other separators are recognised, too: the reader of the task then says what is wrong, and no table becomes a text.
    header = _names(re.split("[,;\t]", first.replace('"', "")))
    if header == _TRIPLE:
        return "modular_triples"
    return "regression_prompts" if header[0] == "prompt" and header[-1] == "y" else "text"


def fingerprint(*tensors: Tensor) -> str:
    """A checksum of the numbers, by which two runs on the same file know each other."""
    return digest([raw_bytes(tensor.contiguous()) for tensor in tensors])


def _rows(path: Path, what: str, check_header: Callable[[Path, list[str]], None]) -> Iterator[tuple[int, list[str]]]:
    """The header, then every row with its line, one at a time: only numbers of a large file are kept in memory.

    Rows without a value are left out: spreadsheets write them below a table.
    """
    with reading(path, what), open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        header = _names(next(lines, []))
        check_header(path, header)
        yield 1, header
        for row in lines:
            if not any(text.strip() for text in row):
                continue
            if len(row) != len(header):
                wanted = f"{len(row)} values, and the header has {len(header)} columns ({_shown(header)})"
                _refuse(path, lines.line_num, wanted)
            yield lines.line_num, [text.strip() for text in row]


def _names(header: Sequence[str]) -> list[str]:
    """The names of columns, in lower case: "A" is "a"."""
    return [name.strip().lower() for name in header]


def _check_prompt_header(path: Path, header: Sequence[str]) -> None:
    d = len(header) - 2
    if d < 1 or list(header) != ["prompt", *(f"x{i}" for i in range(1, d + 1)), "y"]:
        _refuse(
            path,
            1,
            f"the header of regression prompts is prompt,x1,...,xd,y, separated by commas; got {_shown(header)}",
        )


def _check_triple_header(path: Path, header: Sequence[str]) -> None:
    if list(header) != _TRIPLE:
        _refuse(path, 1, f"the header of triples is a,b,c, separated by commas; got {_shown(header)}")


def _shown(header: Sequence[str]) -> str:
    return f"{','.join(header):.80}" if any(header) else "an empty line"


def _check_length(path: Path, lengths: Sequence[int], names: dict[str, int], line: int) -> None:
    """Raise unless the prompt that ends before this line has as many rows as the first, at least two."""
    if not lengths:
        return
    name, began = next(reversed(names.items()))
    if lengths[-1] < 2:
        _refuse(path, began, f"prompt {name!r:.60} has 1 row; a prompt is at least one example and the query")
    if lengths[-1] != lengths[0]:
        _refuse(
            path,
            began,
            f"prompt {name!r:.60} has {lengths[-1]} rows, and the first has {lengths[0]}; all prompts of a file have "
            "the same number, so give one file for each number of examples",
        )


def _number(path: Path, line: int, text: str) -> float:
    try:
        number = float(text) if "_" not in text else math.nan
    except ValueError:
        number = math.nan
    if not abs(number) <= _FLOAT32:  # also False for NaN
        _refuse(path, line, f"{text!r:.60} is no finite number of float32; write numbers such as -0.25 or 1e-3")
    return number


def _residue(path: Path, line: int, text: str, p: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < p):
        _refuse(path, line, f"{text!r:.60} is no whole number from 0 to p - 1 = {p - 1}")
    return int(text)


def _refuse(path: Path, line: int, why: str) -> NoReturn:
    raise InputError(f"{path} line {line}: {why}")
