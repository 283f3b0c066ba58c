"""Executes every annotation of hooklens while tests run: `pytest --annotations`.

The option of jaxtyping's own plugin does so too, at three times the time of the tests: it checks arguments twice, and
decorates a function within a function anew in every call of the outer one, such as the closures of hooks. Here beartype
alone checks functions that name no shape, arguments are checked once, and inner functions only where they name shapes.
"""

import ast
import dataclasses
import functools
import inspect
import re
import sys
import types
import typing
from importlib.abc import MetaPathFinder
from importlib.machinery import SourceFileLoader

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, jaxtyped

PACKAGE = "hooklens"
_DECORATE = ast.parse("__import__('annotations').checked", mode="eval").body


class Violation(TypeCheckError):
    """With the words by which tests of refusals know that an annotation spoke first."""

    def __init__(self, message: str) -> None:
        named = re.sub(r"parameter (\w+)=", r"parameter '\1' = ", message, count=1)
        super().__init__(f"Type-check error (TypeCheckError): {named}")


_BEARTYPE = beartype(conf=BeartypeConf(violation_type=Violation))


def checked(what):
    """The function, or the class of data, with its annotations executed in every call."""
    if isinstance(what, classmethod | staticmethod):
        return type(what)(checked(what.__func__))
    if isinstance(what, property):
        return property(*(part and checked(part) for part in (what.fget, what.fset, what.fdel)))
    if not inspect.isclass(what):
        return _checked_function(what)
    if dataclasses.is_dataclass(what) and "__init__" in vars(what):
        what.__init__ = checked(what.__init__)
    return what


def _checked_function(function):
    if inspect.isgeneratorfunction(function):  # its arguments would be checked in whatever call takes its first value
        return function
    written = function.__annotations__
    read = {name: _read(part, function.__globals__) for name, part in written.items()}
    function.__annotations__ = read
    found = _BEARTYPE(function)
    function.__annotations__ = found.__annotations__ = written  # for those who look at the signature
    return _in_a_scope(found) if names_a_shape(read.values()) else found


def _in_a_scope(function):
    """Names of axes mean one size within a call. jaxtyping's own wrapper also writes them into the texts of errors."""

    @functools.wraps(function)
    def scoped(*args, **kwargs):
        with jaxtyped("context"):
            return function(*args, **kwargs)

    return scoped


def _read(annotation, names):
    """What is in quotes read; anything where it is a name imported for type checkers alone, or names itself."""
    try:
        found = typing.get_type_hints(types.SimpleNamespace(__annotations__={"it": annotation}), names)["it"]
    except NameError:
        return typing.Any
    return typing.Any if any(isinstance(part, typing.ForwardRef) for part in _parts([found])) else found


def names_a_shape(annotations) -> bool:
    return any(inspect.isclass(part) and issubclass(part, AbstractArray) for part in _parts(annotations))


def _parts(annotations) -> list:
    parts = list(annotations)
    for part in parts:
        parts += typing.get_args(part)
    return parts


class Decorated(ast.NodeTransformer):
    """Every function and class decorated; of functions within functions those which name shapes."""

    inside = False

    def visit_ClassDef(self, node):
        self.generic_visit(node)
        node.decorator_list.insert(0, _DECORATE)  # the outermost, so that it sees what `dataclass` made
        return node

    def visit_FunctionDef(self, node):
        inside, self.inside = self.inside, True
        self.generic_visit(node)
        self.inside = inside
        if not inside or "[Tensor, '" in ast.unparse(node.args) + ast.unparse(node.returns or ast.Constant(None)):
            node.decorator_list.append(_DECORATE)
        return node


class Loader(SourceFileLoader):
    def get_code(self, fullname):  # never from the compiled files, which are undecorated
        path = self.get_filename(fullname)
        tree = ast.fix_missing_locations(Decorated().visit(ast.parse(self.get_data(path), path)))
        return compile(tree, path, "exec", dont_inherit=True)


class Finder(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] != PACKAGE:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    if PACKAGE in sys.modules:
        raise RuntimeError(f"{PACKAGE} was imported before its annotations could be executed")
    sys.meta_path.insert(0, Finder())
