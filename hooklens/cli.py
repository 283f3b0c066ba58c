"""The command line: parses, calls a plugin, prints a table, writes a report. Everything heavy is imported when needed.

Exit codes: 0 done; 1 a check failed, or something unexpected happened; 2 a command or an input that cannot be used;
3 something outside is missing (network, disk, a device, a package); 130 interrupted.
"""

import contextlib
import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from hooklens.core.errors import ArgumentError, CheckFailed, HooklensError, InputError, Refused, Unavailable, judge
from hooklens.core.terminal import json_line, printable

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer
    from hooklens.table import Table

OK, FAILED, BAD_INPUT, MISSING, INTERRUPTED = 0, 1, 2, 3, 130
_DEFAULT = "smollm2-135m-instruct"
_HELP = """Every activation of a transformer by name, and exact patching experiments.

Begin with `hooklens demo`. Exit codes: 0 done; 1 a check failed, or something unexpected happened; 2 a command or an
input that cannot be used; 3 something outside is missing (network, disk, a device, a package); 130 interrupted."""


class _Group(TyperGroup):
    """Turns what a command raises into one message and an exit code."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _usage_shown():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _usage_shown():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            _say("interrupted")  # notes on it are for Python, such as an argument that would keep what is done
            raise typer.Exit(INTERRUPTED) from error
        except HooklensError as error:
            _fail(ctx, f"error: {_in_options(ctx, error)}", error)
            raise typer.Exit(_code(error)) from error
        except BrokenPipeError:  # whoever read the output has heard enough: typer ends quietly
            raise
        except (OSError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
            if type(error).__module__.startswith(("click", "typer")):  # usage errors and exits print themselves
                raise
            _fail(ctx, f"unexpected {type(error).__name__}: {error}; `hooklens --debug ...` shows where", error)
            raise typer.Exit(FAILED) from error


@contextmanager
def _usage_shown() -> Iterator[None]:
    """Usage errors print themselves, and quote what was given: nothing in it may act on the terminal."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "message"):
            error.message = printable(error.message)
        raise


app = typer.Typer(
    cls=_Group, help=_HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)


class Dtype(StrEnum):
    """What weights are loaded as."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Option("--model", "-m", help="An asset, a GGUF file, a folder, a checkpoint or a hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...; by default cpu.")]
OfDtype = Annotated[Dtype | None, typer.Option(help="What weights are loaded as; by default float32.")]
Seed = Annotated[int, typer.Option(help="Repeats a random choice exactly.", min=0, max=2**32 - 1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _version(asked: bool | None) -> None:
    if asked:
        from importlib.metadata import version

        print(f"hooklens {version('hooklens')}")
        raise typer.Exit(OK)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show where an error was raised.")] = False,
    version: Annotated[
        bool | None, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = None,
) -> None:
    """Options of every command; `_Group` reads `debug`, `_version` the other."""


@app.command()
def demo(
    model: Model = _DEFAULT,
    out: Annotated[Path, typer.Option(help="The report; its numbers go beside it as .json.")] = Path(
        "hooklens-demo.html"
    ),
    n: Annotated[int, typer.Option("--pairs", help="Prompt pairs, a multiple of 4.")] = 64,
    seed: Seed = 0,
    device: Device = None,
    dtype: OfDtype = None,
    as_json: AsJson = False,
) -> None:
    """Who gets the drink? The indirect-object experiment on a small model, with a report.

    Example: `hooklens demo --out ioi.html`
    """
    from hooklens.data.ioi import check_n_pairs, ioi

    judge({"out": lambda: check_out(out), "n": lambda: check_n_pairs(n), **of_model(model, device)})
    loaded = load_reader(model, device, dtype)
    from hooklens import cli_time
    from hooklens.plugins.patching.ioi_demo import ioi_study

    say_how_long(loaded, cli_time.of_demo(loaded, *ioi(loaded, n, seed=seed).clean_tokens.shape))
    study = ioi_study(loaded, n, seed=seed)
    study.report().save(out, data=study)
    halves = "called on one half of the pairs, measured on the other" if study.held_out else "all on the same pairs"
    caption = f"Heads, {halves}. patched, direct: what each restores of the clean-corrupted difference."
    show(study.table(), as_json, caption=caption, more={"finding": study.finding(), **written(out)})


@app.command()
def patch(
    clean: Annotated[str, typer.Option(help="The prompt that is answered rightly.")],
    corrupted: Annotated[str, typer.Option(help="The same prompt with one thing changed.")],
    answer: Annotated[str, typer.Option(help="The clean prompt's next token, often with a leading space.")],
    wrong_answer: Annotated[str, typer.Option(help="The corrupted prompt's next token.")],
    model: Model = _DEFAULT,
    sites: Annotated[list[str] | None, typer.Option("--site", help="What is patched; may be repeated.")] = None,
    by: Annotated[
        str | None, typer.Option(help="The grid, such as 'layer x head x pos', of the sites that have these axes.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The report; its numbers go beside it as .json.")] = Path("patch.html"),
    device: Device = None,
    dtype: OfDtype = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Which activations carry the difference between two prompts? Patch them one at a time; write a report.

    Example: `hooklens patch --clean "When Mary and John went to the store, John gave a drink to" --corrupted "When Mary
    and John went to the store, Mary gave a drink to" --answer " Mary" --wrong-answer " John" --site z --out ioi.html`

    An interrupted run goes on where it stopped when the same command is given again. The seed chooses which patches are
    checked against the plain way.
    """
    sites = sites or ["resid_pre", "z"]
    from hooklens import cli_time
    from hooklens.plugins.patching.pair_study import check_pair, grids, study_pair
    from hooklens.sweeps.settings import engine

    words = of_pair(clean, corrupted, answer, wrong_answer)
    known = {"out": lambda: check_out(out), "sites": lambda: grids(sites, by), **words, **of_model(model, device)}
    asked = (model, clean, corrupted, answer, wrong_answer, str(by), str(dtype), str(device))
    parts = {name: _part(out, name, asked) for name in judge(known)["sites"]}
    loaded = load_reader(model, device, dtype)

    n_pos, swept = check_pair(loaded, clean, corrupted, answer, wrong_answer, sites=sites, by=by)
    say_how_long(loaded, cli_time.of_patch(loaded, n_pos, swept))

    options: dict[str, Any] = {
        "answer": answer,
        "wrong_answer": wrong_answer,
        "sites": sites,
        "by": by,
        "resume": parts,
    }
    _say(*(f"going on from {path}" for path in parts.values() if path.exists()))
    try:
        with engine(seed=seed):
            study = study_pair(loaded, clean, corrupted, **options)
    except KeyboardInterrupt:
        if kept := ", ".join(str(path) for path in parts.values() if path.exists()):
            _say(f"what is done is kept in {kept}; the same command goes on from there")
        raise
    study.report().save(out, data=study)
    for path in parts.values():
        path.unlink(missing_ok=True)
    one = study.any_sweep
    scale = "0 as in the corrupted run, 1 as in the clean one"
    scale = scale if one.defined else "nan: the two runs do not surely differ"
    runs: dict[str, Any] = {"clean": round(one.clean, 4), "corrupted": round(one.corrupted, 4), "recovered": scale}
    caption = "The patches that moved the logit difference most; recovered: the share of clean minus corrupted."
    show(study.table(), as_json, caption=caption, more=runs | written(out))


@app.command()
def models(as_json: AsJson = False) -> None:
    """What can be loaded, and from where.

    Example: `hooklens models --json`
    """
    from hooklens.pretrained.load import models as known

    show(known(), as_json)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="An asset, a GGUF file, a folder, a checkpoint or a hub id.")] = _DEFAULT,
    device: Device = None,
    dtype: OfDtype = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Load a model and verify what every model here promises; exit code 1 if something does not hold.

    Example: `hooklens check smollm2-135m-instruct --dtype float64`
    """
    from hooklens import cli_time
    from hooklens.pretrained.check import check as verify
    from hooklens.table import Table

    judge(of_model(model, device))
    loaded = load_model(model, device, dtype)
    _say(*cli_time.told(cli_time.of_check(loaded)))
    report = verify(loaded, seed=seed)
    numbers = Table(("check", "measured", "at most", "ok"), report.rows)
    caption = "What was measured, and the most that it may be."
    show(
        numbers if as_json else report.table(), as_json, caption=caption, more={"model": report.model, "ok": report.ok}
    )
    raise typer.Exit(OK if report.ok else FAILED)


@app.command()
def plugins(as_json: AsJson = False) -> None:
    """Which methods are installed, ours and other people's.

    Example: `hooklens plugins`
    """
    from hooklens.plugins import available
    from hooklens.table import Table

    rows = [(info.name, info.error or info.summary, info.package) for info in available()]
    show(Table(("plugin", "what it answers", "package"), rows), as_json)


@app.command()
def run(
    plugin: Annotated[str, typer.Argument(help="A name that `hooklens plugins` lists.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="By default a tiny random model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result's table and figure as a page.")] = None,
    device: Device = None,
    dtype: OfDtype = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run a plugin's demo and print its result: on short prompts, or on token numbers without a tokenizer.

    Example: `hooklens run patching --model smollm2-135m-instruct --out patching.html`
    """
    from hooklens import cli_time
    from hooklens.plugins import find

    def check_seed() -> None:
        if model is not None and seed:
            raise InputError(f"--seed {seed} draws the tiny model, and --model {model} is given; leave one of them out")

    known = {"plugin": lambda: find(plugin), "seed": check_seed, "out": lambda: out and check_out(out)}
    info = judge({**known, **of_model(model, device)})["plugin"]
    answer = info.demo()
    loaded = _tiny(device, dtype, seed) if model is None else load_model(model, device, dtype)
    if model is not None and loaded.cfg.d_vocab:
        say_how_long(loaded, cli_time.of_demo_of(loaded, info.module))
    result = answer(loaded)
    told = f"A demo. {_first_line(answer)}" + _TINY * (model is None)
    caption, terms = f"{info.summary}\n{told}", getattr(result, "terms", {})
    if out is None:
        show(result.table(), as_json, caption=caption, terms=terms)
        return
    from hooklens.viz.report import Report

    report = Report(f"{plugin} in {loaded.cfg.model_name}").text(info.summary).text(told)
    report.figure(result.figure()).table(result.table(), "", terms).save(out, data=result)
    show(result.table(), as_json, caption=caption, terms=terms, more=written(out))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the model goes on from.")],
    model: Model = _DEFAULT,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 50,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    device: Device = None,
    dtype: OfDtype = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Go on from a prompt, token by token to the terminal.

    Example: `hooklens generate --chat "Why is the sky blue?" --temperature 0.7`
    """
    from hooklens import cli_time
    from hooklens.model.sampling import Sampling, check_length

    known = {
        "max_new_tokens": lambda: check_length(max_new_tokens),
        "temperature": lambda: Sampling(temperature),
    }
    judge({**known, **of_model(model, device)})
    loaded = load_reader(model, device, dtype)
    if chat:
        prompt = loaded._need_tokenizer().apply_chat_template([{"role": "user", "content": prompt}])
    _say(*cli_time.told(cli_time.of_generate(loaded, max_new_tokens)))
    new = loaded.generate(prompt, max_new_tokens, temperature=temperature, seed=seed, stream=not as_json)
    if as_json:
        typer.echo(json_line({"text": new.text, "tokens": new.new_tokens[0].tolist(), "seed": seed}))


def main() -> None:
    """The entry point of the `hooklens` command."""
    import hooklens.cli_methods  # noqa: F401  its commands register themselves

    app(prog_name="hooklens")


_TINY = (
    " Its model is tiny and random: this shows what the method gives, and its numbers mean nothing; "
    "--model smollm2-135m-instruct runs it on a trained one."
)


def _first_line(function: Any) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def of_model(model: str | None, device: str | None) -> dict[str, Callable[[], Any]]:
    """What can be said of these two options before a model is loaded."""
    from hooklens.pretrained.load import as_device, check_source

    return {"model": lambda: model is None or check_source(model), "device": lambda: as_device(device)}


def of_pair(
    clean: str | None, corrupted: str | None, answer: str | None, wrong_answer: str | None
) -> dict[str, Callable[[], Any]]:
    """What can be said of a pair before a model reads it: the same text twice is no question."""

    def differ(one: str | None, other: str | None, message: str) -> None:
        if one is not None and one == other:
            raise ArgumentError(message, one)

    prompts = "{clean} and {corrupted} are the same; change one word of {corrupted}"
    answers = "{answer} and {wrong_answer} are the same token {0!r}, so their difference is 0"
    return {"clean": lambda: differ(clean, corrupted, prompts), "answer": lambda: differ(answer, wrong_answer, answers)}


def load_model(model: str, device: str | None, dtype: Dtype | None) -> "HookedTransformer":
    from hooklens.pretrained.load import load

    return judge({"model": lambda: load(model, device=device, dtype=None if dtype is None else dtype.value)})["model"]


def load_reader(model: str, device: str | None, dtype: Dtype | None) -> "HookedTransformer":
    """A model that can read text."""
    loaded = load_model(model, device, dtype)
    if loaded.tokenizer is None:
        raise InputError(
            f"--model {model} has no tokenizer, and this command reads text; give a model that has one, such as a GGUF "
            "file or a folder with tokenizer.json (in Python, token ids will do)"
        )
    return loaded


def _tiny(device: str | None, dtype: Dtype | None, seed: int) -> "HookedTransformer":
    from hooklens.pretrained.load import as_device, as_dtype
    from hooklens.testing import tiny_model

    return tiny_model(seed=seed).to(device=as_device(device) or "cpu", dtype=as_dtype(dtype and dtype.value))


def check_out(out: Path) -> Path:
    """The report's path, once both of its files can be written: before anything is computed."""
    from hooklens.core.files import check_writable

    if not out.name or out.is_dir():
        raise InputError(f"--out {str(out)!r} is a folder, and the report is a file; use {str(out / 'report.html')!r}")
    if out.suffix == ".json":
        raise InputError(f"--out {out} is the name of the numbers beside the page; use {out.with_suffix('.html')}")
    for path in (out, out.with_suffix(".json")):
        check_writable(path)
    return out


def written(out: Path) -> dict[str, Any]:
    """Where the report and its numbers are, from anywhere."""
    return {"report": out.absolute(), "numbers": out.with_suffix(".json").absolute()}


def _part(out: Path, site: str, asked: tuple[str, ...]) -> Path:
    """Where a site's unfinished sweep is kept: another question has another file."""
    digest = hashlib.blake2b("\0".join(asked).encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return out.with_name(f"{out.stem}.{site}.{digest}.part")


def say_how_long(model: "HookedTransformer", tokens: int | float) -> None:
    """Before a command that takes more than a minute: about how long."""
    from hooklens.cli_time import how_long

    _say(*how_long(model, tokens))


Tables = Mapping[str, tuple[str, "Table"]]


def show(
    table: "Table",
    as_json: bool,
    *,
    caption: str = "",
    terms: Mapping[str, str] | None = None,
    before: Tables | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """A table under a line that says what it shows, and what else there is to say; or all of it as one JSON object.

    `terms` say what columns are; `before` are tables that come first, each with its own line.
    """
    more = more or {}
    if as_json:
        others = {name: _objects(other) for name, (_, other) in (before or {}).items()}
        told = {name: str(value) if isinstance(value, Path) else value for name, value in more.items()}
        typer.echo(json_line(_plain({"rows": _objects(table), **others, **told})))
        return
    for line, one in (*(before or {}).values(), (caption, table)):
        _print(line, one)
    known = {name: meaning for name, meaning in (terms or {}).items() if name in table.columns}
    typer.echo("".join(f"{name}: {printable(value)}\n" for name, value in (known | _short(more)).items()), nl=False)


def _plain(value: Any) -> Any:
    from hooklens.result import plain

    return plain(value)


def _objects(table: "Table") -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def _print(caption: str, table: "Table") -> None:
    if caption:
        typer.echo(printable(caption))
    if sys.stdout is not None and sys.stdout.isatty():  # None: it was closed before the start
        from rich.console import Console

        Console().print(table)
    else:
        typer.echo(printable(table))


def _short(more: Mapping[str, Any]) -> dict[str, Any]:
    """Files beside the first are told by name alone."""
    paths = [value for value in more.values() if isinstance(value, Path)]
    beside = [path for path in paths[1:] if path.parent == paths[0].parent]
    return {
        name: f"{value.name}, beside it" if any(value is path for path in beside) else value
        for name, value in more.items()
    }


def _in_options(ctx: Any, error: HooklensError) -> str:
    """The message, with the command's options in place of the arguments that it names: parameters are named alike."""
    if not isinstance(error, ArgumentError | Refused):
        return str(error)
    command = ctx.command.get_command(ctx, ctx.invoked_subcommand or "")
    options = {one.name: max(one.opts, key=len) for one in command.params}  # --model, not -m
    names = {name: option if option.startswith("-") else option.upper() for name, option in options.items()}
    return error.told({"site": names.get("sites", "site"), **names})


def _code(error: HooklensError) -> int:
    errors = [one for _, one in error.errors] if isinstance(error, Refused) else [error]
    if all(isinstance(one, Unavailable) for one in errors):
        return MISSING
    return FAILED if isinstance(error, CheckFailed) else BAD_INPUT


def _fail(ctx: Any, message: str, error: Exception) -> None:
    if ctx.params.get("debug"):
        _say("".join(traceback.format_exception(error)))
    _say(message, *getattr(error, "__notes__", ()))


def _say(*lines: str) -> None:
    with contextlib.suppress(OSError):  # a full disk behind standard error must not replace the exit code
        for line in lines:
            typer.echo(printable(line), err=True)
