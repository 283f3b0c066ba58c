"""Tiny models with known answers, and the battery that every plugin passes."""

import inspect
import json
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from hooklens.core import hooks
from hooklens.core.envelope import digest
from hooklens.core.errors import WrongType
from hooklens.core.fingerprint import raw_bytes
from hooklens.model.config import Biases, HookedTransformerConfig, Softmax
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins import find
from hooklens.results import statistics
from hooklens.results.result import Result, Table
from hooklens.results.result_file import Kept

__all__ = ["and_gate", "check_plugin", "induction_model", "methods", "or_gate", "same", "tiny_model"]

_MOST_PARAMETERS = 8
#: What a method may study, as its first argument.
_STUDIED = ("model", "module", "run", "points")
#: Arguments that are keywords, with the default that they have everywhere; None: any default.
_KEYWORDS = {"answer": None, "wrong_answer": None, "draws": None, "seed": 0, "level": 0.95, "alpha": 0.05}
#: Other words for a baseline, which has one name in every result.
_BASELINES = dict.fromkeys(("whole", "untouched", "unedited", "unpatched", "original", "intact", "baseline"), "base")
_BASELINES |= dict.fromkeys(("nothing", "ablated", "none"), "empty")
#: Words in the name of a table's column that holds a control.
_CONTROLS = ("control", "placebo", "random", "shuffled", "others", "before repeats", "another token", "at init")
Problems = Iterator[tuple[str, str]]  # the clause that is broken, and what was seen


# -- models


def tiny_model(*, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> HookedTransformer:
    """A random model of 2 layers, 2 heads, d_model 8 and 11 tokens; any configuration field may be changed.

    >>> tiny_model()
    HookedTransformer(tiny: 2 layers, d_model 8, 2 heads of 4, d_mlp 32, 0.0M parameters)
    """
    sizes: dict[str, Any] = {
        "n_layers": 2,
        "d_model": 8,
        "n_ctx": 32,
        "n_heads": 2,
        "d_vocab": 11,
        "model_name": "tiny",
    }
    return HookedTransformer(HookedTransformerConfig(**sizes | changes), seed=seed, dtype=dtype)


def induction_model(*, d_vocab: int = 11, n_ctx: int = 32, dtype: torch.dtype = torch.float32) -> HookedTransformer:
    """A hand-set model that continues repeated sequences: L0H0 looks at the previous token, L1H1 is an induction head.

    >>> model = induction_model()
    >>> logits, cache = model.run_with_cache([[3, 1, 4, 3, 1]], names="pattern")
    >>> logits[0].argmax(-1)[3:].tolist()          # after the second 3 comes 1, after the second 1 comes 4
    [1, 4]
    >>> cache["pattern", 1][0, 1, 3].tolist()      # the second 3 looks at what followed the first one
    [0.0, 1.0, 0.0, 0.0, 0.0]

    The other two heads write nothing. Position 0 has no previous token, so no query of L1H1 but its own looks there.
    Where a token is new, L1H1 is uniform over the positions from 1 on.

    Reference: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits", induction heads.
    """
    token, place = torch.eye(d_vocab), torch.eye(n_ctx)
    at = _slots(token=d_vocab, place=n_ctx, previous=d_vocab, next=d_vocab)
    sizes: dict[str, Any] = {"n_layers": 2, "d_model": n_ctx + 3 * d_vocab, "n_heads": 2, "d_head": max(d_vocab, n_ctx)}
    model = _blank("induction", n_ctx=n_ctx, d_vocab=d_vocab, attn_only=True, score_fn=Softmax(scale=1.0), **sizes)
    blocks: Any = model.blocks
    sharp = 1000.0  # exp(-1000) is 0 in every dtype, so that a pattern is 0 and 1 exactly
    with torch.no_grad():
        model.W_E[:, at["token"]] = token
        model.W_pos[:, at["place"]] = place
        previous, induction = (block.attn for block in blocks)
        previous.W_Q[0, at["place"], :n_ctx] = sharp * place
        previous.W_K[0, at["place"], :n_ctx] = place.roll(1, 1)  # the key of position j answers to query j + 1
        previous.W_K[0, at["place"], 0] = 0.0
        previous.W_V[0, at["token"], :d_vocab] = token
        previous.W_O[0, :d_vocab, at["previous"]] = token
        induction.W_Q[1, at["token"], :d_vocab] = sharp * token
        induction.W_K[1, at["previous"], :d_vocab] = token
        induction.W_K[1, at["place"].start, :d_vocab] = -2.0
        induction.W_V[1, at["token"], :d_vocab] = token
        induction.W_O[1, :d_vocab, at["next"]] = token
        model.W_U[at["next"]] = 10 * token
    return model.to(dtype)


def or_gate(*, dtype: torch.dtype = torch.float32) -> HookedTransformer:
    """Two heads that each write 1, and an MLP that says 1 if either does: redundancy, which gradients cannot see.

    >>> gate = or_gate()
    >>> def off(*heads):
    ...     return lambda z, hook: z.index_fill(2, torch.tensor(heads).long(), 0.0)
    >>> [gate.run_with_hooks([[0]], fwd_hooks=[("z", off(*heads))])[0, -1, 1].item() for heads in ((), (0,), (0, 1))]
    [1.0, 1.0, 0.0]

    The gate is the logit of token 1 (that of token 0 is 0). Its gradient by either head is 0, since
    1 - relu(1 - (head 0 + head 1)) is flat where both are on.
    """
    model = _blank("or gate", d_model=2, n_heads=2, d_head=1, d_mlp=1, biases=Biases(o=False))
    block: Any = model.blocks[0]
    with torch.no_grad():
        block.attn.b_V.fill_(1.0)
        block.attn.W_O[:, 0, 0] = 1.0
        block.mlp.W_in[0, 0], block.mlp.b_in[0] = -1.0, 1.0
        block.mlp.W_out[0, 1], block.mlp.b_out[1] = -1.0, 1.0
        model.W_U[1, 1] = 1.0
    return model.to(dtype)


def and_gate(*, sharpness: float = 1e5, n_ctx: int = 32, dtype: torch.dtype = torch.float64) -> HookedTransformer:
    """Uniform attention and one neuron that says 1 only if every token so far is 1, exactly for n < `sharpness`.

    >>> gate = and_gate()
    >>> [round(gate([tokens])[0, -1, 1].item(), 6) for tokens in ([1, 1, 1], [1, 0, 1], [0, 0, 0])]
    [1.0, 0.0, 0.0]

    The gate is the logit of token 1: M relu(mean - (M - 1) / M) for sharpness M. In float32 the difference keeps only
    a few digits, hence float64.
    """
    model = _blank("and gate", d_model=3, n_ctx=n_ctx, n_heads=1, d_head=1, d_mlp=1, biases=Biases(qkv=False, o=False))
    model = model.to(dtype)
    block: Any = model.blocks[0]
    with torch.no_grad():
        model.W_E[1, 0] = 1.0
        block.attn.W_V[0, 0, 0] = 1.0
        block.attn.W_O[0, 0, 1] = 1.0
        block.mlp.W_in[1, 0], block.mlp.b_in[0] = 1.0, -(sharpness - 1) / sharpness
        block.mlp.W_out[0, 2] = sharpness
        model.W_U[2, 1] = 1.0
    return model


def _blank(name: str, **changes: Any) -> HookedTransformer:
    """A model without norms whose every weight is 0."""
    sizes: dict[str, Any] = {"n_layers": 1, "n_ctx": 32, "d_vocab": 2, "act_fn": "relu", "normalization_type": None}
    positions = "learned" if changes.get("attn_only") else "none"
    parts: dict[str, Any] = {"positional_embedding_type": positions, "biases": Biases(qkv=False, o=False, mlp=False)}
    model = HookedTransformer(HookedTransformerConfig(**sizes | parts | changes, model_name=name))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


def _slots(**widths: int) -> dict[str, slice]:
    """Neighbouring slices of the stream, one a name."""
    ends = np.cumsum([0, *widths.values()]).tolist()
    return {name: slice(a, b) for name, a, b in zip(widths, ends[:-1], ends[1:], strict=True)}


# -- the battery


def check_plugin(plugin: str | ModuleType, *, models: Mapping[str, HookedTransformer] | None = None) -> None:
    """Does a plugin keep the contract? Raises AssertionError with the clause that it breaks.

    >>> check_plugin("patch")

    `plugin` is a registered name or the module itself. Its `demo(model)` runs on `models` (by what to call them in a
    message; by default tiny ones: two layers, one layer of one head, float64, bfloat16, attention only, grouped keys).
    Clauses: signature, conventions (docs/naming.md), docstring, runs, weights, gradients, hooks, grad mode, generators,
    training mode, same twice, frozen, dtype, table, figure, JSON, saved.
    """
    module = find(plugin).load() if isinstance(plugin, str) else plugin
    if not isinstance(module, ModuleType):
        raise WrongType(f"check_plugin takes a plugin's registered name or its module, got {plugin!r:.80}")
    name, results = module.__name__, {}
    _refuse(name, _signature_problems(module))
    for what, model in (_models() if models is None else models).items():
        where = f"{name} on a model with {what}" if models is None else f"{name} on {what}"
        first = _run(module, model, where)
        with _other_modes(model):
            second = _run(module, model, f"{where}, gradients off and training mode flipped")
        if not same(first, second):
            _refuse(where, iter([("same twice", "demo(model) gave two different results; take a seed")]))
        _refuse(where, _result_problems(first, model))
        results[where] = first
    for where, result in results.items():  # last: the one clause that needs a package around the module
        _refuse(where, _tried("saved", _saved, result))


def _models() -> dict[str, HookedTransformer]:
    return {
        "two layers": tiny_model(),
        "one layer of one head, 5 tokens": tiny_model(n_layers=1, n_heads=1, d_model=2, d_vocab=5, n_ctx=4),
        "float64 weights": tiny_model(dtype=torch.float64),
        "bfloat16 weights": tiny_model(dtype=torch.bfloat16),
        "attention only": tiny_model(attn_only=True),
        "grouped keys and rotary positions": tiny_model(
            n_heads=4, n_key_value_heads=2, positional_embedding_type="rotary", gated_mlp=True, normalization_type="RMS"
        ),
    }


def _refuse(where: str, problems: Problems) -> None:
    """Raise for the first of these problems, if there is one."""
    for clause, seen in problems:
        raise AssertionError(f"{where} breaks the clause {clause!r}: {seen}")


def methods(module: ModuleType) -> dict[str, Callable]:
    """The plugin's own public functions that the rules apply to: they study something, or return a Result.

    >>> from hooklens.plugins.patching import activation
    >>> list(methods(activation))
    ['patch']
    """
    functions = {}
    for name, fn in vars(module).items():
        own = inspect.isfunction(fn) and (fn.__module__ + ".").startswith(module.__name__ + ".")
        if own and name != "demo" and not name.startswith("_"):
            first = next(iter(inspect.signature(fn).parameters), "")
            if first in _STUDIED or _returns_result(fn, module):
                functions[name] = fn
    return functions


def _returns_result(fn: Callable, module: ModuleType) -> bool:
    returned = inspect.signature(fn).return_annotation
    kinds = [
        vars(module).get(kind, kind) if isinstance(kind, str) else kind for kind in (returned, *get_args(returned))
    ]
    return any(isinstance(kind, type) and issubclass(kind, Result) for kind in kinds)


def _signature_problems(module: ModuleType) -> Problems:
    """The first argument, the number and kind of the parameters, the docstrings, and the names of arguments."""
    if not callable(getattr(module, "demo", None)):
        yield "signature", "there is no demo(model)"
    if not methods(module):
        studied = ", ".join(_STUDIED)
        yield "signature", f"no public function takes one of {studied} first or is annotated to return a Result"
    if not inspect.getdoc(module):
        yield "docstring", "the module has no docstring, so that a list shows nothing"
    needed = [p.name for p in inspect.signature(module.demo).parameters.values() if p.default is p.empty]
    if len(needed) != 1:
        yield "signature", f"demo takes the model alone, not {needed}"
    for name, fn in methods(module).items():
        parameters = inspect.signature(fn).parameters
        first = next(iter(parameters), None)
        if first not in _STUDIED:
            studied = ", ".join(_STUDIED)
            yield "signature", f"{name} takes {first!r} first; a method takes what it studies first: {studied}"
        open_ended = [str(p) for p in parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        if open_ended:
            yield "signature", f"{name} takes {', '.join(open_ended)}; name every option"
        if len(parameters) > _MOST_PARAMETERS:
            many = f"{name} takes {len(parameters)} parameters, more than {_MOST_PARAMETERS}"
            yield "signature", f"{many}; split it into two methods"
        if not inspect.getdoc(fn):
            yield "docstring", f"{name} has no docstring"
        yield from _unconventional(name, fn)


def _unconventional(called: str, fn: Callable, *, of_result: bool = False) -> Problems:
    """Parameters that are not as docs/naming.md has them."""
    for name, parameter in inspect.signature(fn).parameters.items():
        if name not in _KEYWORDS:
            continue
        by_position = name == "level" and of_result  # interval(0.9) reads well
        if parameter.kind != parameter.KEYWORD_ONLY and not by_position:
            yield "conventions", f"{called} takes {name} by position; it is a keyword: put it after *"
        default = _KEYWORDS[name]
        if default is not None and parameter.default != default:
            yield "conventions", f"{called} has {parameter}; everywhere it is {name}={default}"
        usual = parameter.default in (None, parameter.empty, statistics.DRAWS)
        if name == "draws" and not usual and not _explained(fn, parameter.default):
            yield (
                "conventions",
                f"{called} has {parameter}; it is results.statistics.DRAWS ({statistics.DRAWS}), or a constant named "
                "..._DRAWS with the reason, what a draw costs, in a comment beside it",
            )


def _explained(fn: Callable, draws: int) -> bool:
    """Is the number a constant whose line says why, or one that is imported?"""
    fn = inspect.unwrap(fn)
    named = [name for name, value in fn.__globals__.items() if name.endswith("DRAWS") and value == draws]
    try:
        text = "".join(inspect.findsource(fn)[0])
    except OSError:  # typed in, so that there is no file to read the comment in
        return bool(named)
    return any(re.search(rf"^{name} = .*#|^from .*\b{name}\b", text, re.M) for name in named)


def _run(module: ModuleType, model: HookedTransformer, where: str) -> Result:
    """Run the demo, and compare everything that it must not change before and after."""
    before = _state(model)
    try:
        result = module.demo(model)
    except Exception as error:
        raise AssertionError(
            f"{where} breaks the clause 'runs': demo raised {type(error).__name__}: {error}"
        ) from error
    finally:
        after = _state(model)
        _tidy(model, before)
    _refuse(where, ((clause, _CHANGED[clause]) for clause, value in before.items() if value != after[clause]))
    if not isinstance(result, Result):
        _refuse(where, iter([("frozen", f"demo returned a {type(result).__name__}, not a Result")]))
    return result


_CHANGED = {
    "weights": "parameters or buffers of the model are not bit for bit what they were; work on a copy.deepcopy",
    "gradients": "it left .grad on the model's parameters, or switched requires_grad; use torch.autograd.grad",
    "hooks": "it left hooks, an open scope or torch hooks on the model; use `with model.hooks(...)`",
    "grad mode": "it left gradients switched on or off, or inference mode; use a `with` block",
    "generators": "it drew from a global random generator (torch, numpy or random); use a torch.Generator of its own",
    "training mode": "it left the model in another training mode; put back what was there",
}


def _state(model: HookedTransformer) -> dict[str, Any]:
    """Everything that a plugin must leave as it was, a fingerprint a clause."""
    modules, parameters = list(model.modules()), list(model.parameters())
    points = [m for m in modules if isinstance(m, hooks.HookPoint)]
    numpy = [np.asarray(part).tolist() for part in np.random.get_state()]
    # Where shapes are executed, beartype draws from this generator to choose which element of a list it looks at.
    python = None if "beartype" in sys.modules else random.getstate()
    return {
        "hooks": [frozenset(hooks._open_scopes), *(len(p.handles) for p in points), *map(_torch_hooks, modules)],
        "weights": {name: _digest(t) for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "gradients": [(p.requires_grad, None if p.grad is None else _digest(p.grad)) for p in parameters],
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "generators": (_digest(torch.get_rng_state()), numpy, python),
        "training mode": [m.training for m in modules],
    }


def _torch_hooks(module: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for kind in kinds)


def _digest(tensor: Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), digest([raw_bytes(tensor)])


def _tidy(model: HookedTransformer, before: dict[str, Any]) -> None:
    """A broken plugin must not break the tests that follow: end its scopes and handles, restore the modes."""
    for lifetime in hooks._open_scopes - before["hooks"][0]:
        scope = hooks.HookScope(model, lifetime.value)
        scope.lifetime = lifetime
        scope.end()
    torch.set_grad_enabled(before["grad mode"][0])


@contextmanager
def _other_modes(model: HookedTransformer) -> Iterator[None]:
    """Gradients off and every module's training flag flipped: a plugin's result must not depend on either."""
    modules = list(model.modules())
    flags = [m.training for m in modules]
    for m, flag in zip(modules, flags, strict=True):
        m.training = not flag
    try:
        with torch.no_grad():
            yield
    finally:
        for m, flag in zip(modules, flags, strict=True):
            m.training = flag


def _result_problems(result: Result, model: HookedTransformer) -> Problems:
    """Frozen, readable as a table, drawable, plain enough for JSON, precise, and named as other results are."""
    declared = vars(type(result)).get("__dataclass_params__")
    if declared is None or not declared.frozen or declared.eq:
        yield "frozen", f"{type(result).__name__} is not declared with @dataclass(frozen=True, eq=False)"
    for clause, check in (("table", _tabulated), ("figure", _drawn), ("JSON", _as_json)):
        yield from _tried(clause, check, result)
    for name, tensor in _tensors(result):
        if tensor.is_floating_point() and model.dtype == torch.float64 != tensor.dtype:
            yield "dtype", f"{name} is {tensor.dtype}, though the model computes in float64"
    for name, tensor in _p_values(result):
        if tensor.dtype != torch.float64:
            yield "dtype", f"{name} is {tensor.dtype}; p and q are float64: in float32 1/20 lies above 0.05"
    yield from (("conventions", seen) for seen in _misnamed(result))
    for name, method in vars(type(result)).items():
        if name in ("interval", "held_out_top"):
            yield from _unconventional(f"{type(result).__name__}.{name}", method, of_result=True)


def _tried(clause: str, check: Callable[[Result], str | None], result: Result) -> Problems:
    try:
        problem = check(result)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        yield clause, problem


def _tabulated(result: Result) -> str | None:
    table = result.table()
    if not isinstance(table, Table) or not str(table):
        return f"table() returned {type(table).__name__}, not a hooklens.Table with columns"
    return None if len(result.table(1)) <= 1 else "table(1) has more than one row; table(n) shows at most n"


def _misnamed(result: Result) -> Iterator[str]:
    """Names of a result that differ from those of docs/naming.md, "Results"."""
    cls = type(result)
    read = {f.name for f in fields(result)} | {n for n in dir(cls) if _is_property(inspect.getattr_static(cls, n))}
    methods = {name: method for name, method in vars(cls).items() if inspect.isfunction(method)}
    called = [name for name in methods if name in ("p", "q") or name.endswith(("_p", "_q"))]
    if called:
        yield f"{', '.join(called)} is a method; p and q are fields or properties"
    if "p" in read and "q" not in read and not isinstance(getattr(result, "p", None), float | None):
        yield "p holds several tests and there is no q; make it a property: q_values(self.p)"
    if "top" in methods:
        yield "it defines top(k), which every result inherits; say ranked_by = '...', and what `ranking` is if need be"
    elif cls.ranked_by:
        yield from _misranked(result)
    for name in sorted(read):
        other = _BASELINES.get(name.partition("_per_")[0])
        if other is not None and isinstance(getattr(result, name), float | Tensor):
            yield f"{name} is a baseline, which is called {other} in every result ({other}_per_... the tensor)"
    for name in {"clean", "corrupted", "base", "empty", "chance"}.intersection(read):
        if isinstance(getattr(result, name), Tensor):
            per = f"{name}_per_prompt, _per_pair, ..."
            yield f"{name} is a tensor; a baseline is a number, the mean, and its tensor {per}"
    odd = [name for name in result.baselines if not isinstance(getattr(result, name, None), float | int)]
    if odd:
        yield f"baselines names {odd}, which are not numbers of the result"
    columns = [column for column in result.table().columns if any(word in column for word in _CONTROLS)]
    if unexplained := [column for column in columns if column not in result.terms]:
        yield f"the table has a control that its `terms` do not explain: {', '.join(unexplained)}"


def _misranked(result: Result) -> Iterator[str]:
    """Whether `top(k)` can be `k` rows of the table, in the order that the class declares."""
    rows, ranking = [str(row) for row in result.table(None).rows], result.ranking
    if ranking is not None and ranking.shape != (len(rows),):
        yield f"ranking has the shape {list(ranking.shape)}, and table(None) {len(rows)} rows; it is a number for each"
    elif ranking is None and [str(row) for row in result.top(1).rows] != rows[:1]:
        yield "top(1) is not the first row of table(None), which ranked_by says is in order"


def _is_property(attribute: Any) -> bool:
    return isinstance(attribute, property | cached_property)


def _drawn(result: Result) -> str | None:
    figure = result.figure()
    if not hasattr(figure, "to_plotly_json") or not len(figure.data):
        return f"figure() returned {figure!r:.60}, not a Plotly figure with something in it"
    same_again = figure.to_json() == result.figure().to_json()
    return None if same_again else "figure() drew two different figures of one result"


def _as_json(result: Result) -> str | None:
    json.dumps(result.to_json(), allow_nan=False)
    return None


def _saved(result: Result) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.safetensors"
        result.save(path)
        back = Result.load(path)
    return None if same(result, back) else f"the {type(back).__name__} that was read back differs from what was saved"


def _p_values(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every field and property named p or q (`p_turned`, `score_q`) of a result and of the results inside it."""
    if isinstance(value, Result):
        named = {name for name, of in vars(type(value)).items() if isinstance(of, property | cached_property)}
        for name in sorted(named | {f.name for f in fields(value)}):
            if {"p", "q"} & set(name.split("_")):
                yield from _tensors(getattr(value, name), name)
        for f in fields(value):
            yield from _p_values(getattr(value, f.name))
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _p_values(item)


def _tensors(value: Any, name: str = "result") -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside a value, with the path to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Result):
        for f in fields(value):
            yield from _tensors(getattr(value, f.name), f"{name}.{f.name}")
    elif isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(item, f"{name}[{key!r}]")


def same(a: Any, b: Any) -> bool:
    """Equal in value and type all the way down, tensors bit for bit, NaN equal to NaN.

    >>> same([torch.tensor(float("nan")), {"x": 1}], [torch.tensor(float("nan")), {"x": 1}]), same(1, 1.0)
    (True, False)
    """
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return _digest(a) == _digest(b)
    if isinstance(a, Kept):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and a != a and b != b)
