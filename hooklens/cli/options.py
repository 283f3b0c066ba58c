"""Options shared by several commands, and checks that need no loaded model."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooklens.core.errors import ArgumentError, InputError, judge

if TYPE_CHECKING:
    from hooklens.data.prompt_pairs import PromptPairs
    from hooklens.model.transformer import HookedTransformer
    from hooklens.results.claims import Registration

DEFAULT = "smollm2-135m-instruct"


class Dtype(StrEnum):
    """The dtype of the weights."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Option("--model", "-m", help="An asset, a GGUF file, a folder, a checkpoint or a hub id.")]


Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...; by default cpu.")]


OfDtype = Annotated[Dtype | None, typer.Option(help="The dtype of the weights; by default float32.")]


Seed = Annotated[int, typer.Option(help="Seed of all random choices, for exact repetition.", min=0, max=2**32 - 1)]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def of_model(model: str | None, device: str | None) -> dict[str, Callable[[], Any]]:
    """Checks of these two options that need no loaded model."""
    from hooklens.pretrained.loading import as_device, check_source

    return {"model": lambda: model is None or check_source(model), "device": lambda: as_device(device)}


def of_pair(
    clean: str | None, corrupted: str | None, answer: str | None, wrong_answer: str | None
) -> dict[str, Callable[[], Any]]:
    """Checks of a pair before a model reads it: the two prompts, and the two answers, must differ."""

    def differ(one: str | None, other: str | None, message: str) -> None:
        if one is not None and one == other:
            raise ArgumentError(message, one)

    prompts = "{clean} and {corrupted} are the same; change one word of {corrupted}"
    answers = "{answer} and {wrong_answer} are the same token {0!r}, so their difference is 0"
    return {"clean": lambda: differ(clean, corrupted, prompts), "answer": lambda: differ(answer, wrong_answer, answers)}


def load_model(model: str, device: str | None, dtype: Dtype | None) -> "HookedTransformer":
    from hooklens.pretrained.loading import load

    return judge({"model": lambda: load(model, device=device, dtype=None if dtype is None else dtype.value)})["model"]


def load_reader(model: str, device: str | None, dtype: Dtype | None) -> "HookedTransformer":
    """Load a model with a tokenizer."""
    loaded = load_model(model, device, dtype)
    if loaded.tokenizer is None:
        raise InputError(
            f"--model {model} has no tokenizer, and this command reads text; give a model with a tokenizer, such as a "
            "GGUF file or a folder with tokenizer.json (in Python, token ids suffice)"
        )
    return loaded


def check_out(out: Path) -> Path:
    """Return the report's path if both of its files can be written; checked before anything is computed."""
    from hooklens.core.files import check_writable

    if not out.name or out.is_dir():
        raise InputError(f"--out {str(out)!r} is a folder, but the report is a file; use {str(out / 'report.html')!r}")
    if out.suffix == ".json":
        raise InputError(f"--out {out} is the name of the JSON file next to the page; use {out.with_suffix('.html')}")
    for path in (out, out.with_suffix(".json")):
        check_writable(path)
    return out


Clean = Annotated[str | None, typer.Option(help="The prompt that the model answers correctly.")]


Corrupted = Annotated[str | None, typer.Option(help="The same prompt with one thing changed.")]


Answer = Annotated[str | None, typer.Option(help="The prompt's next token, often with a leading space.")]


WrongAnswer = Annotated[str | None, typer.Option(help="Another next token to compare it with.")]


Out = Annotated[Path, typer.Option(help="The report; its numbers go beside it as .json.")]


PairsFile = Annotated[Path | None, typer.Option("--pairs", help="A JSONL file of prompt pairs instead; see docs.")]


Plans = Annotated[
    list[Path] | None, typer.Option("--registered", help="A plan that `hooklens register` wrote before the run.")
]


Digests = Annotated[
    list[str] | None, typer.Option("--digest", help="A plan's full digest as published; without: self-dated.")
]


def pairs_of(
    path: Path | None, clean: str | None, corrupted: str | None, answer: str | None, wrong_answer: str | None
) -> "PromptPairs":
    """Pairs from a file or the one of the options; not both, not half of one."""
    from hooklens.data.jsonl import read_pairs_file
    from hooklens.data.prompt_pairs import PromptPairs

    given = {"--clean": clean, "--corrupted": corrupted, "--answer": answer, "--wrong-answer": wrong_answer}
    named = [name for name, value in given.items() if value is not None]
    if path is not None:
        if named:
            raise InputError(f"--pairs {path} has prompts and answers, so {' and '.join(named)} cannot be given too")
        return read_pairs_file(path)
    if len(named) < len(given):
        missing = [name for name in given if name not in named]
        raise InputError(f"give --pairs file.jsonl, or a pair by {', '.join(given)}; missing: {', '.join(missing)}")
    return PromptPairs(clean, corrupted, answer=answer, wrong_answer=wrong_answer)


def tokens_of(model: "HookedTransformer", pairs: "PromptPairs") -> int:
    """The number of tokens of all clean prompts."""
    return sum(len(model.to_tokens(text)[0]) for text in pairs.clean)


def plans_of(paths: list[Path] | None, digests: list[str] | None) -> "list[Registration]":
    """The plans in these files; a missing or edited plan raises before anything runs."""
    from hooklens.results.claims import read_plans

    return read_plans(paths or [], digests or [])


def check_pairs(model: "HookedTransformer", pairs: "PromptPairs", path: Path | None) -> None:
    """Raise if the model cannot use these pairs; lists every unusable line of a file, before anything runs."""
    from hooklens.data.jsonl import check_pair, check_pairs

    if path is None:
        check_pair(model, pairs)
    else:
        check_pairs(model, pairs, str(path))
