"""The base of all results: a frozen record with a compact repr, a table, a figure, and a file format."""

import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.errors import HooklensError, InputError, WrongType
from hooklens.results.result_file import Kept, read_result, write_result
from hooklens.results.table import Table, format_number

__all__ = ["Result", "Table", "plain", "summary"]

_SHOWN = 24  # number of table rows shown in a notebook
_PRINTED = 8  # number of table rows when a result is printed
_HEADLINE = 110  # characters
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
R = TypeVar("R", bound="Result")
_KINDS = {"float": "Float", "bfloat": "BFloat", "int": "Int", "uint": "UInt", "complex": "Complex", "bool": "Bool"}


@dataclass(frozen=True, eq=False)
class Result(Kept):
    """Base class of all results: declare fields, and get a compact repr, a table, a file format and JSON.

    >>> @dataclass(frozen=True, eq=False)
    ... class HeadScores(Result):
    ...     scores: Tensor
    ...     clean: float
    ...     site: str = "z"
    >>> result = HeadScores(torch.zeros(12, 9), clean=3.2123456)
    >>> result
    HeadScores(scores=Float[12 9], clean=3.212, site='z')
    >>> print(result.table())
    field   value
    scores  Float[12 9]
    clean   3.212
    site    'z'

    Fields are tensors, numbers, strings, booleans, None, nested results, or lists, tuples and dicts of these.
    A subclass overrides `table` and `figure` where they mean something; it is then printed as its first rows. Its
    `terms` explain the columns of its table whose names do not explain themselves, and every control.
    """

    terms: ClassVar[Mapping[str, str]] = {}
    #: The quantity by which `top(k)` ranks the rows of the table, the largest first. The table has that order itself,
    #: or the class has a `ranking`: a property with a number for every row of `table(None)`, NaN for rows without rank.
    ranked_by: ClassVar[str] = ""
    ranking: ClassVar[Any] = None
    #: Fields and properties that are needed to read the table; the headline begins with them.
    baselines: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__repr__" not in vars(cls):
            cls.__repr__ = Result.__repr__  # type: ignore[method-assign]  # else @dataclass would write one that prints whole tensors
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method) and (name == "table" or name.startswith("top")):
                setattr(cls, name, _counting(method))

    def __repr__(self) -> str:
        """Name, headline and the first rows of the table; a single line for a class without its own table."""
        if type(self).table is Result.table:
            return self._in_one_line()
        try:
            table, head = self.table(_PRINTED + 1), self.headline()
            more = "\n... more rows: .table(None)" if len(table) > _PRINTED else ""
            return f"{type(self).__name__}{': ' if head else ''}{head}\n{table.head(_PRINTED)}{more}"
        except Exception:  # a repr must not fail: tracebacks and debuggers show it, also for a partially built result
            return self._in_one_line()

    def headline(self) -> str:
        """One line of context for the table: the baselines, then the other numbers and words."""
        line = ""
        for name in dict.fromkeys((*self.baselines, *(field.name for field in _in_order(self) if field.repr))):
            value = getattr(self, name)
            if isinstance(value, bool | str | Real) and value != "":
                longer = f"{line}{', ' if line else ''}{name} {summary(value)}"
                line = longer if len(longer) <= _HEADLINE else line
        return line

    def _in_one_line(self) -> str:
        shown = (f"{field.name}={summary(getattr(self, field.name))}" for field in _in_order(self) if field.repr)
        return f"{type(self).__name__}({', '.join(shown)})"

    def table(self, n: int | None = None) -> Table:
        """The result as a table of at most `n` rows; by default one row per field."""
        return Table(("field", "value"), [(f.name, summary(getattr(self, f.name))) for f in _in_order(self)]).head(n)

    def top(self, k: int = 10) -> Table:
        """The `k` rows of the table that matter most, by what `ranked_by` says. Other tables raise an error."""
        if not self.ranked_by:
            kind, others = type(self).__name__, [name for name in dir(type(self)) if name.startswith("top_")]
            use = " or ".join(f"{name}()" for name in ("table", *others))
            raise WrongType(f"a {kind} has no top(k): nothing in its table is ranked; use {use}")
        k, ranking = whole("k", k), self.ranking
        if ranking is None:
            return self.table(k)
        table, order = self.table(None), ranking.argsort(descending=True, stable=True).tolist()
        return Table(table.columns, [table.rows[i] for i in order if not ranking[i].isnan()]).head(k)

    def figure(self) -> Any:  # a plotly Figure, which only viz may import
        """The result as a Plotly figure. Defined only for results that have one."""
        kind = type(self).__name__
        raise WrongType(f"a {kind} has no figure(): it defines no picture; use table(), or hooklens.viz on its fields")

    def _repr_html_(self) -> str:
        """The table for a notebook, fully escaped."""
        table = self.table()
        more = len(table) - _SHOWN
        rest = f"<p>{more} more rows: .table(None)</p>" if more > 0 else ""
        return f"<div><b>{type(self).__name__}</b>{table.head(_SHOWN).to_html()}{rest}</div>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """The figure above the table if the class has one, in the format of the active Plotly renderer."""
        table = self._repr_html_()
        if type(self).figure is Result.figure:
            return {"text/html": table}
        try:
            drawn = self.figure()._repr_mimebundle_()
        except HooklensError:  # this result has nothing to draw
            drawn = {}
        return drawn | {"text/html": drawn.get("text/html", "") + table}

    def to_json(self) -> dict[str, Any]:
        """Convert every field to plain numbers, for `json.dumps`.

        >>> Result().to_json()
        {'class': 'Result'}
        """
        return plain(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write the result as one safetensors file, atomically; `Result.load` reads it back."""
        write_result(self, path)

    @classmethod
    def load(cls: type[R], path: str | os.PathLike) -> R:
        """Read a result that `save` wrote. Its class is looked up among the registered plugins, never imported by name.

        A damaged or foreign file raises FileRefused before any of its tensors is used.
        """
        result = read_result(path)
        if not isinstance(result, cls):
            raise WrongType(
                f"{cls.__name__}.load cannot read {str(path)!r}: the file contains a {type(result).__name__}; "
                f"use {type(result).__name__}.load or Result.load"
            )
        return result


def _in_order(result: Result) -> list[Field]:
    """The fields as the constructor takes them: those taken by keyword, such as those of `RunAccount`, last."""
    return sorted(fields(result), key=lambda field: bool(field.kw_only))


def _counting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Check the number of `table(n)`, `top(k)`, `top_edges(n)`: a slice would read -1 as "all but the last"."""
    parameters = list(inspect.signature(method).parameters)
    name = parameters[1] if len(parameters) > 1 else ""

    @functools.wraps(method)
    def counted(self: Result, *args: Any, **named: Any) -> Any:
        number = args[0] if args else named.get(name)
        if number is not None:
            whole(name, number)
        return method(self, *args, **named)

    return counted


def summary(value: Any) -> str:
    """Summarise a value in a few characters: shapes instead of numbers, counts instead of elements.

    >>> summary(torch.zeros(2, 3, dtype=torch.int64)), summary([1, 2]), summary("a" * 99)
    ('Int[2 3]', 'list of 2', "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...'")
    """
    if isinstance(value, Tensor):
        if value.ndim == 0 and not value.is_meta:
            return summary(value.item())
        return f"{_kind(value.dtype)}[{' '.join(map(str, value.shape))}]"
    if isinstance(value, str):
        return repr(value if len(value) <= 38 else value[:35] + "...")
    if isinstance(value, Real) and not isinstance(value, bool):
        return format_number(int(value) if isinstance(value, Integral) else float(value))
    for kind in (list, tuple, dict):
        if isinstance(value, kind):
            return f"{kind.__name__} of {len(value)}"
    if isinstance(value, Result):
        return value._in_one_line()
    if value is None or isinstance(value, bool):
        return repr(value)
    return type(value).__name__


def _kind(dtype: torch.dtype) -> str:
    """jaxtyping's name of a dtype, with the width if it is unusual: Float, Float64, BFloat16, Int."""
    name = str(dtype).removeprefix("torch.")
    word = name.rstrip("0123456789")
    usual = {torch.float32, torch.int64, torch.complex64, torch.bool}
    return _KINDS.get(word, name) + ("" if dtype in usual or word not in _KINDS else name[len(word) :])


def plain(value: Any) -> Any:
    """Convert a value to strict JSON: tensors as nested lists, results as dicts, no NaN literals.

    >>> plain({5: torch.tensor([1.5, float("nan")]), "site": ("z", None)})
    {'5': [1.5, 'NaN'], 'site': ['z', None]}

    NaN and the infinities become the strings "NaN", "Infinity" and "-Infinity", which `float()` reads.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Kept):
        return {"class": type(value).__name__} | {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        named = {str(key): plain(item) for key, item in value.items()}
        if len(named) == len(value):
            return named
        raise InputError(
            f"a dict with keys {list(value)[:6]} cannot be written as JSON, where keys are strings and some of these "
            "become equal; rename them"
        )
    if isinstance(value, complex):
        return [plain(value.real), plain(value.imag)]
    if hasattr(value, "tolist"):  # tensors and NumPy arrays
        return plain(value.tolist())
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else _NOT_FINITE[str(number)]
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    raise WrongType(
        f"a {type(value).__name__} cannot be written as JSON, which supports numbers, strings, booleans, None, "
        "lists and dicts (and tensors and results as those); convert it first"
    )
