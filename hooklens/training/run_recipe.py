"""A recipe: all the settings of a run in one TOML file, from which it can be repeated."""

import contextlib
import copy
import inspect
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import hooklens.data as tasks
from hooklens.core.arguments import seed_number, whole
from hooklens.core.errors import ArgumentError, InputError, NameNotFound, WrongType, did_you_mean
from hooklens.core.files import read_text, write_atomically
from hooklens.data.batches import TrainingData
from hooklens.model.config import HookedTransformerConfig
from hooklens.training.training_settings import Settings

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

TASKS = (
    "decimal_arithmetic",
    "in_context_regression",
    "markov_source",
    "modular_arithmetic",
    "modular_triples",
    "random_repeats",
    "regression_prompts",
    "shakespeare",
    "text",
    "tiny_stories",
    "tiny_stories_dataset",
)
FILE_TASKS = ("modular_triples", "regression_prompts", "text")  # those of a file of one's own, `source`
_TABLES = ("data", "model", "training")
MODEL = {"n_layers": 4, "d_model": 128, "n_heads": 4, "seed": 0}
_TRAINING = {
    "batch": 32,
    "clip": 1.0,
    "optimizer": {"part": "adamw", "lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 0.1},
}
_STEPS = 2000
_OF_TASK: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "modular_arithmetic": {  # Nanda et al. (2023), section 3 and their code: see docs/grokking.md
        "model": {
            "n_layers": 1,
            "act_fn": "relu",
            "normalization_type": None,
            "biases": {"qkv": False, "o": False, "mlp": True},
            "init": {"part": "normal", "std": 128**-0.5, "unembed_std": 114**-0.5},
        },
        "training": {
            "steps": 20_000,
            "batch": 20_000,
            "clip": None,
            "evaluate": 400,
            "checkpoints": 60,
            "optimizer": {"part": "adamw", "lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 1.0},
            "schedule": {"part": "constant", "warmup": 10},
            "loss": {"part": "cross_entropy", "double": True},
        },
    },
    "in_context_regression": {"training": {"loss": {"part": "squared_error"}}},
    "regression_prompts": {"training": {"loss": {"part": "squared_error"}}},
    "shakespeare": {  # measured by benchmarks/shakespeare.py
        "data": {"window": 64},
        "model": {"positional_embedding_type": "rotary"},
        "training": {
            "steps": 7000,
            "batch": 16,
            "evaluate": 40,
            "optimizer": {"part": "adamw", "lr": 3e-3, "betas": [0.9, 0.99], "weight_decay": 0.1},
            "schedule": {"part": "cosine", "floor": 0.02, "warmup": 200},
        },
    },
}
_SCHEDULE = {"part": "cosine", "floor": 0.1, "warmup": 100}  # the warm-up at most a tenth of the run


@dataclass(frozen=True)
class Recipe:
    """The three tables of a run: its data, its model and its training.

    >>> recipe = Recipe({"task": "decimal_arithmetic", "digits": 2}, {"d_model": 32}, {"steps": 10})
    >>> recipe.model["n_layers"], recipe.load_data().digits, recipe.settings().batch
    (4, 2, 32)

    `data` names a task of `hl.data` under "task", and its arguments. `model` holds fields of
    `hl.HookedTransformerConfig`, and the seed of its weights; n_ctx and d_vocab follow from the data. `training` holds
    the number of steps and the fields of `hl.training.Settings`. What is left out has a default.
    """

    data: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        of_task = _OF_TASK.get(str(self.data.get("task")), {})
        usual = _joined({"steps": _STEPS, **_TRAINING, "schedule": _SCHEDULE}, of_task.get("training", {}))
        with _in_table("training"):
            steps = whole("steps", self.training.get("steps", usual["steps"]), 1)
        usual["schedule"]["warmup"] = min(usual["schedule"]["warmup"], steps // 10)
        object.__setattr__(self, "data", _joined(of_task.get("data", {}), self.data))
        object.__setattr__(self, "model", _joined(_joined(MODEL, of_task.get("model", {})), self.model))
        object.__setattr__(self, "training", _joined(usual, self.training))
        self._check()

    def _check(self) -> None:
        """Find what is wrong before the data are read."""
        if "task" not in self.data:
            raise InputError(f"[data] needs a task; there are {', '.join(TASKS)}")
        if self.data["task"] in FILE_TASKS and "source" not in self.data:
            raise InputError(f'[data] of the task {self.data["task"]} needs source = "...", the path of its file')
        if self.data["task"] not in TASKS:
            raise did_you_mean("task", self.data["task"], TASKS)
        _check_names(
            f"setting of [data] for {self.data['task']}", self.data, ["task", *arguments_of(self.data["task"])]
        )
        _check_names("setting of [model]", self.model, ["seed", *(f.name for f in fields(HookedTransformerConfig))])
        _check_names("setting of [training]", self.training, ["steps", *(f.name for f in fields(Settings))])
        self.settings()
        self.config(n_ctx=1, d_vocab=1)

    def settings(self) -> Settings:
        """How to train."""
        with _in_table("training"):
            return Settings.from_json({name: value for name, value in self.training.items() if name != "steps"})

    def config(self, **derived: Any) -> HookedTransformerConfig:
        """The model's configuration, with what follows from the data."""
        given = {name: value for name, value in self.model.items() if name != "seed"}
        with _in_table("model"):
            seed_number(self.model["seed"])
            return HookedTransformerConfig.from_json({**derived, **given})

    def load_data(self) -> TrainingData:
        """The data of the task."""
        arguments = {name: value for name, value in self.data.items() if name != "task"}
        with _in_table("data", ArgumentError):
            return getattr(tasks, self.data["task"])(**arguments)

    def load_model(self, data: TrainingData, *, device: Any = None) -> "HookedTransformer":
        """The untrained model, with the tokenizer of the data."""
        from hooklens.model.transformer import HookedTransformer

        derived: dict[str, Any] = {"n_ctx": data.n_positions}
        if hasattr(data, "d_in"):  # vectors in, one number out
            derived |= {"embed": {"part": "vectors", "d_in": data.d_in}, "d_vocab": 1, "d_vocab_out": 1}
        else:
            derived["d_vocab"] = data.d_vocab  # type: ignore[attr-defined]
        tokenizer = getattr(data, "tokenizer", None)
        return HookedTransformer(self.config(**derived), tokenizer=tokenizer, seed=self.model["seed"], device=device)

    def changed(self, **tables: Mapping[str, Any]) -> "Recipe":
        """A copy in which some settings have other values; those of a part, such as the optimiser's, are joined.

        >>> recipe = Recipe({"task": "decimal_arithmetic"}).changed(training={"optimizer": {"lr": 0.5}})
        >>> recipe.settings().optimizer.lr, recipe.settings().optimizer.weight_decay
        (0.5, 0.1)
        """
        joined = {name: _joined(getattr(self, name), tables.get(name, {})) for name in _TABLES}
        return Recipe(**joined)

    def differences(self, other: "Recipe") -> list[str]:
        """What another recipe says differently, in words."""
        here, there = (dict(_flat({name: getattr(recipe, name) for name in _TABLES})) for recipe in (self, other))
        return [
            f"{name} was {here.get(name)!r:.60} and is {there.get(name)!r:.60}"
            for name in {**here, **there}
            if here.get(name) != there.get(name)
        ]

    def save(self, path: str | os.PathLike) -> None:
        """Write the recipe as TOML."""
        with write_atomically(path) as aside:
            aside.write_text("".join(_toml({name: getattr(self, name) for name in _TABLES})), encoding="utf-8")


def read_recipe(path: str | os.PathLike) -> Recipe:
    """The recipe in a TOML file: tables [data], [model] and [training]; an unknown name raises with the nearest."""
    text = read_text(path, "the settings of a run", encoding="utf-8-sig")  # some editors begin a file with a mark
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{os.fspath(path)!r} is not TOML: {error}; write tables such as [training]") from error
    _check_names("table", content, _TABLES)
    for name, table in content.items():
        if not isinstance(table, dict):
            raise InputError(f"[{name}] is a table of settings, got {table!r:.80}")
    return Recipe(**{"data": {}, **content})


@contextlib.contextmanager
def _in_table(name: str, kind: type[InputError] = InputError) -> Iterator[None]:
    """Say in which table of the file a value of a wrong type or range stands."""
    try:
        yield
    except (kind, NameNotFound, WrongType) as error:
        raise InputError(f"[{name}] {error}") from error


def arguments_of(task: str) -> list[str]:
    """The settings of a task."""
    return list(inspect.signature(getattr(tasks, task)).parameters)


def _check_names(what: str, given: Mapping[str, Any], known: list[str] | tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise did_you_mean(what, name, known)


def _joined(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Two tables, the second over the first; a part of another kind replaces the first's."""
    if "part" in now and now["part"] != before.get("part"):
        return copy.deepcopy(dict(now))
    joined = copy.deepcopy(dict(before))
    for name, value in now.items():
        old = joined.get(name)
        joined[name] = _joined(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return joined


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


def _toml(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The lines of a table and its sub-tables. TOML has no word for None: such a setting is left out.

    >>> print("".join(_toml({"training": {"steps": 3, "optimizer": {"part": "sgd"}}})).strip())
    [training]
    steps = 3
    <BLANKLINE>
    [training.optimizer]
    part = "sgd"
    """
    values = {name: value for name, value in table.items() if not isinstance(value, Mapping) and value is not None}
    if prefix and values:
        yield f"[{prefix}]\n"
    for name, value in values.items():
        yield f"{name} = {_value(value)}\n"
    yield "\n" if values else ""
    for name, inner in table.items():
        if isinstance(inner, Mapping):
            yield from _toml(inner, f"{prefix}.{name}" if prefix else name)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if not isinstance(value, Real):
        raise WrongType(f"the settings of a run are plain numbers, texts, lists and tables; got {value!r:.80}")
    return repr(int(value) if isinstance(value, Integral) else float(value))  # those of numpy print their type
