"""Options that several commands share, in groups, and their checks that need no loaded model.

A group is a dataclass: a command that takes one as a parameter has an option for each of its fields (`base.command`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooklens.core.errors import ArgumentError, InputError, judge

if TYPE_CHECKING:
    from hooklens.data.prompt_pairs import PromptPairs
    from hooklens.model.transformer import HookedTransformer
    from hooklens.results.claims import ClaimFamily, Registration

DEFAULT = "smollm2-135m-instruct"
SOURCE = "An asset, a GGUF file, a folder, a checkpoint or a hub id."
DTYPE = "The dtype of the weights: float32, float64, bfloat16 or float16; by default float32."
CLEAN = typer.Option(help="The prompt that the model answers correctly.")
CORRUPTED = typer.Option(help="The same prompt with one thing changed.")
ANSWER = typer.Option(help="The prompt's next token, often with a leading space.")
WRONG_ANSWER = typer.Option(help="Another next token to compare it with.")
PAIRS_FILE = typer.Option("--pairs", help="A JSONL file of prompt pairs instead; see docs.")
Out = Annotated[Path, typer.Option(help="The report; its numbers go beside it as .json.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_OF_A_PAIR = {name: f"--{name.replace('_', '-')}" for name in ("clean", "corrupted", "answer", "wrong_answer")}
Checks = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class ModelOptions:
    """The model, the seed of all random choices, and the format of the output."""

    model: Annotated[str | None, typer.Option("--model", "-m", help=SOURCE)] = DEFAULT
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...; by default cpu.")] = None
    dtype: Annotated[str | None, typer.Option(help=DTYPE)] = None
    seed: Annotated[
        int, typer.Option(help="Seed of all random choices, for exact repetition.", min=0, max=2**32 - 1)
    ] = 0
    as_json: AsJson = False

    def judge(self, checks: Checks) -> dict[str, Any]:
        """Run these checks and those of the model's options; nothing is loaded or computed before they pass."""
        from hooklens.pretrained.loading import as_dtype, check_source, computing_device

        source = {"model": lambda: self.model is None or check_source(self.model)}
        own = {"device": lambda: computing_device(self.device), "dtype": lambda: as_dtype(self.dtype)}
        return judge({**checks, **source, **own})

    def load(self) -> "HookedTransformer":
        """Load the model."""
        from hooklens.pretrained.loading import load

        return judge({"model": lambda: load(str(self.model), device=self.device, dtype=self.dtype)})["model"]

    def load_reader(self) -> "HookedTransformer":
        """Load a model with a tokenizer."""
        loaded = self.load()
        if loaded.tokenizer is None:
            raise InputError(
                f"--model {self.model} has no tokenizer, and this command reads text; give a model with a tokenizer, "
                "such as a GGUF file or a folder with tokenizer.json (in Python, token ids suffice)"
            )
        return loaded


@dataclass(frozen=True)
class ReportOptions(ModelOptions):
    """The same, and the file of the report. Commands set its name."""

    out: Annotated[Path | None, typer.Option(help="Write the result's table and figure as a page.")] = None

    def judge(self, checks: Checks) -> dict[str, Any]:
        """The same, after a check that the report can be written."""
        return super().judge({"out": lambda: None if self.out is None else check_out(self.out), **checks})

    def write(self, report: Any, data: Any) -> dict[str, Path]:
        """Save the report with its numbers, and return the absolute paths of both files."""
        path = report.save(self.out, data=data)
        return {"report": path.absolute(), "numbers": path.with_suffix(".json").absolute()}


@dataclass(frozen=True)
class PairOptions:
    """Prompt pairs: a file, or one pair as options."""

    clean: Annotated[str | None, CLEAN] = None
    corrupted: Annotated[str | None, CORRUPTED] = None
    answer: Annotated[str | None, ANSWER] = None
    wrong_answer: Annotated[str | None, WRONG_ANSWER] = None
    pairs: Annotated[Path | None, PAIRS_FILE] = None

    def given(self) -> list[str]:
        """The options of a single pair that were given."""
        return [option for name, option in _OF_A_PAIR.items() if getattr(self, name) is not None]

    def checks(self) -> dict[str, Callable[[], Any]]:
        """Checks before a model reads them: the two prompts, and the two answers, must differ."""

        def differ(value: str | None, other: str | None, message: str) -> None:
            if value is not None and value == other:
                raise ArgumentError(message, value)

        prompts = "{clean} and {corrupted} are the same; change one word of {corrupted}"
        answers = "{answer} and {wrong_answer} are the same token {0!r}, so their difference is 0"
        return {
            "clean": lambda: differ(self.clean, self.corrupted, prompts),
            "answer": lambda: differ(self.answer, self.wrong_answer, answers),
        }

    def read(self) -> "PromptPairs":
        """The pairs of the file, or the pair of the options; not both, and no incomplete pair."""
        from hooklens.data.jsonl import read_pairs_file
        from hooklens.data.prompt_pairs import PromptPairs

        given = self.given()
        if self.pairs is not None:
            if given:
                raise InputError(
                    f"--pairs {self.pairs} has prompts and answers, so {' and '.join(given)} cannot be given too"
                )
            return read_pairs_file(self.pairs)
        options = _OF_A_PAIR.values()
        if missing := [option for option in options if option not in given]:
            raise InputError(
                f"give --pairs file.jsonl, or a pair by {', '.join(options)}; missing: {', '.join(missing)}"
            )
        return PromptPairs(self.clean, self.corrupted, answer=self.answer, wrong_answer=self.wrong_answer)

    def check(self, model: "HookedTransformer", pairs: "PromptPairs") -> None:
        """Raise if the model cannot use these pairs; lists every unusable line of a file, before anything runs."""
        from hooklens.data.jsonl import check_pair, check_pairs

        if self.pairs is None:
            check_pair(model, pairs)
        else:
            check_pairs(model, pairs, str(self.pairs))


@dataclass(frozen=True)
class PlanOptions:
    """Claims that were registered before the run."""

    registered: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="A plan that `hooklens register` wrote before the run.")
    ] = None
    digest: Annotated[
        list[str] | None, typer.Option(help="A plan's full digest as published; without: self-dated.")
    ] = None

    def read(self) -> "list[Registration]":
        """The plans in these files; a missing or edited plan raises before anything runs."""
        from hooklens.results.claims import read_plans

        return read_plans(self.registered or [], self.digest or [])

    def check(self, plans: "Sequence[Registration]", statements: Callable[[], list[str]]) -> None:
        """Raise for a plan that no claim of the command can state."""
        from hooklens.results.claims import check_plans

        judge({"registered": lambda: check_plans(plans, statements() if plans else ())})

    def unmet(self, claims: "ClaimFamily | None", plans: "Sequence[Registration]") -> dict[str, str]:
        """A line for the terminal about plans that no claim of this run states."""
        from hooklens.results.claims import plans_met

        sentences = plans_met(claims, plans)[1]
        return {"plans": " ".join(sentences)} if sentences else {}


def tokens_of(model: "HookedTransformer", pairs: "PromptPairs") -> int:
    """The number of tokens of all clean prompts."""
    return sum(len(model.to_tokens(text)[0]) for text in pairs.clean)


def check_out(out: Path) -> Path:
    """Return the path of the report if both of its files can be written."""
    from hooklens.core.files import check_writable

    if not out.name or out.is_dir():
        raise InputError(f"--out {str(out)!r} is a folder, but the report is a file; use {str(out / 'report.html')!r}")
    if out.suffix == ".json":
        raise InputError(f"--out {out} is the name of the JSON file next to the page; use {out.with_suffix('.html')}")
    for path in (out, out.with_suffix(".json")):
        check_writable(path)
    return out
