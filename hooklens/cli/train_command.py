"""`hooklens train` and `dashboard`."""

import functools
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooklens.cli.base import command, say
from hooklens.cli.options import AsJson, check_out
from hooklens.core.errors import ArgumentError, HooklensError, InputError, did_you_mean, judge
from hooklens.core.terminal import json_line, printable

if TYPE_CHECKING:
    from hooklens.training.run_recipe import Recipe
    from hooklens.training.training_run import Run

_TOKENIZER = "characters, bytes or byte_pairs; for texts."


@dataclass(frozen=True)
class RecipeOptions:
    """The settings that people change most. Left out, they are those of the settings file, or the task's defaults."""

    steps: Annotated[int | None, typer.Option(help="Steps to train; by default 2000 in most tasks.")] = None
    batch: Annotated[int | None, typer.Option(help="Rows of a step; by default 32 in most tasks.")] = None
    lr: Annotated[float | None, typer.Option(help="The learning rate; by default 0.001.")] = None
    layers: Annotated[int | None, typer.Option(help="Blocks of the model; by default 4 in most tasks.")] = None
    d_model: Annotated[int | None, typer.Option(help="Its width; by default 128.")] = None
    heads: Annotated[int | None, typer.Option(help="Attention heads of a layer; by default 4.")] = None
    window: Annotated[int | None, typer.Option(help="Tokens of a row; for texts.")] = None
    tokenizer: Annotated[str | None, typer.Option(help=_TOKENIZER)] = None
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data.", min=0, max=2**32 - 1)] = None
    settings: Annotated[Path | None, typer.Option(help="A TOML file with all settings of a run.")] = None

    def checks(self) -> dict[str, Any]:
        """Checks of single values."""
        from hooklens.core.arguments import whole

        counts = ("steps", "batch", "layers", "d_model", "heads", "window")
        given = {name: getattr(self, name) for name in counts if getattr(self, name) is not None}
        whole_numbers = {name: functools.partial(whole, name, value, 1) for name, value in given.items()}
        return {**whole_numbers, "lr": self._check_lr}

    def _check_lr(self) -> None:
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ArgumentError("{lr} is a number above 0, got {0}", self.lr)

    def tables(self) -> dict[str, dict[str, Any]]:
        """The given options in the tables of a recipe."""
        tables: dict[str, dict[str, Any]] = {
            "data": {"window": self.window, "tokenizer": self.tokenizer, "seed": self.seed},
            "model": {"n_layers": self.layers, "d_model": self.d_model, "n_heads": self.heads, "seed": self.seed},
            "training": {"steps": self.steps, "batch": self.batch, "seed": self.seed},
        }
        if self.lr is not None:
            tables["training"]["optimizer"] = {"lr": self.lr}
        return {name: {key: v for key, v in table.items() if v is not None} for name, table in tables.items()}


@command
def train(
    task: Annotated[
        str | None, typer.Argument(help="A task of `hl.data`, or the path of a file: text, or CSV.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; a run in it goes on.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...; by default cpu.")] = None,
    as_json: AsJson = False,
    *,
    options: RecipeOptions,
) -> None:
    """Train a transformer, and record the run in a folder. The same command continues a run that was stopped.

    Example: `hooklens train shakespeare --out runs/shakespeare`, or `hooklens train my.txt --steps 500 --out runs/mine`

    Tasks: decimal_arithmetic, in_context_regression, markov_source, modular_arithmetic, random_repeats, shakespeare,
    tiny_stories, tiny_stories_dataset. The settings are written to settings.toml in the folder, `--settings` repeats
    them, and `hooklens train --out FOLDER` alone continues the run.
    """
    from hooklens.core.files import make_folder
    from hooklens.pretrained.loading import computing_device
    from hooklens.training.loop import train as train_model
    from hooklens.training.run_folder import RECIPE, RunFolder

    checks = {"task": lambda: _task(task, options.settings, out), "out": lambda: _folder(out), **options.checks()}
    known = judge(
        {**checks, "device": lambda: computing_device(device), "settings": lambda: _kept(out, options.settings)}
    )
    recipe, folder = _recipe(known["task"], known["settings"], options), known["out"]
    begins = not RunFolder(folder).exists
    if not begins:
        _check_same(folder, recipe)
    data = recipe.load_data()
    model = recipe.load_model(data, device=known["device"])
    if begins or (folder / RECIPE).is_file():
        recipe.save(make_folder(folder) / RECIPE)
    try:
        run = train_model(model, data, steps=recipe.training["steps"], out=folder, settings=recipe.settings())
    except KeyboardInterrupt as stopped:
        say(str(stopped).replace("call", "command"))
        raise
    except HooklensError:
        if begins and not RunFolder(folder).exists:
            (folder / RECIPE).unlink()  # what it says cannot be trained
        raise
    _say_end(run, folder, as_json)


def _task(task: str | None, settings: Path | None, out: Path | None) -> dict[str, Any]:
    """The first entries of the table [data] for this argument; none where a file of settings has them."""
    from hooklens.data.number_files import task_of_file
    from hooklens.training.run_folder import RECIPE, RunFolder
    from hooklens.training.run_recipe import FILE_TASKS, TASKS

    generated = [name for name in TASKS if name not in FILE_TASKS]
    if task is None:
        if settings is None and (out is None or not os.path.isfile(out / RECIPE)):
            known = ", ".join(generated)
            if out is not None and RunFolder(out).exists:
                raise InputError(
                    f"{str(out)!r} holds a run without {RECIPE}, such as one that hl.train began in Python; the same "
                    "call there goes on with it"
                )
            raise ArgumentError("give {task}, one of {0}, or a file; or --settings, or --out with a run", known)
        return {}
    if task in generated:
        return {"task": task}
    if Path(task).is_file():
        return {"task": task_of_file(task), "source": task}
    if task in FILE_TASKS:
        raise InputError(f"the task {task} reads a file of your own; give the path of the file in its place")
    unknown = did_you_mean("task", task, generated)
    raise InputError(f"{unknown}; and there is no text file {task!r}")


def _folder(out: Path | None) -> Path:
    from hooklens.training.run_folder import RunFolder

    if out is None:
        raise ArgumentError("give {out}, the folder of the run, such as {0}", "--out runs/first")
    if os.path.exists(out) and not os.path.isdir(out):
        raise InputError(f"--out {str(out)!r} is a file, and a run is a folder; give another name")
    folder = RunFolder(out)
    if not folder.exists:
        folder.check_free()
    return out


def _kept(out: Path | None, settings: Path | None) -> "Recipe | None":
    """The recipe in the file, else that of the run in the folder."""
    from hooklens.training.run_folder import RECIPE
    from hooklens.training.run_recipe import read_recipe

    if settings is not None:
        return read_recipe(settings)
    return read_recipe(out / RECIPE) if out is not None and os.path.isfile(out / RECIPE) else None


def _recipe(task: dict[str, Any], kept: "Recipe | None", options: RecipeOptions) -> "Recipe":
    """The kept recipe or the defaults, with the options over them; for another task, without the kept data."""
    from hooklens.training.run_recipe import Recipe

    tables = options.tables()
    same = kept is not None and all(kept.data.get(name) == value for name, value in task.items())
    data = kept.data if same and kept is not None else task
    _check_options(str(data["task"]), options, kept)
    if kept is None:
        return Recipe(task | tables["data"], tables["model"], tables["training"])
    return Recipe(data, kept.model, kept.training).changed(**tables)


def _check_options(task: str, options: RecipeOptions, kept: "Recipe | None") -> None:
    """Raise for options that do not fit the task or each other."""
    from hooklens.training.run_recipe import MODEL, arguments_of

    def check_argument(name: str) -> None:
        if getattr(options, name) is not None and name not in arguments_of(task):
            known = ", ".join(arguments_of(task))
            raise ArgumentError(f"{{{name}}} is no setting of {{0}}, which has: {{1}}", task, known)

    def check_heads() -> None:
        model = MODEL if kept is None else kept.model
        width, heads = options.d_model or model["d_model"], options.heads or model["n_heads"]
        if "d_head" not in model and width % heads:
            raise ArgumentError("{d_model} {0} is not a multiple of {heads} {1}", width, heads)

    arguments = {name: functools.partial(check_argument, name) for name in ("window", "tokenizer")}
    judge({**arguments, "heads": check_heads})


def _check_same(folder: Path, recipe: "Recipe") -> None:
    """Raise if the run in the folder has other settings; with a constant schedule it may be given more steps."""
    from hooklens.training.run_folder import RECIPE
    from hooklens.training.run_recipe import read_recipe

    if not (folder / RECIPE).is_file():
        return  # made by hl.train, which compares the runs itself
    kept = read_recipe(folder / RECIPE)
    steps = recipe.training["steps"]
    if steps > kept.training["steps"] and not recipe.settings().schedule.depends_on_steps:
        kept = kept.changed(training={"steps": steps})
    if differences := kept.differences(recipe):
        raise InputError(
            f"--out {str(folder)!r} holds a run with other settings: {'; '.join(differences[:3])}; leave these options "
            "out to continue it, or give another folder"
        )


def _say_end(run: "Run", folder: Path, as_json: bool) -> None:
    """Held-out loss before and after, and what to type next."""
    held_out, steps = run.evaluations()["loss"].tolist(), run.steps_done
    following = f"hooklens dashboard {shlex.quote(str(folder))}"
    if as_json:
        losses = {"held_out_loss": held_out[-1], "untrained": held_out[0]} if held_out else {}
        losses["training_loss"] = float(run.loss[-1])
        typer.echo(json_line({"steps": steps, **losses, "run": str(run.path), "next": following}))
        return
    if held_out:
        typer.echo(f"held-out loss after {steps:,} steps: {held_out[-1]:.4f} (untrained {held_out[0]:.4f})")
    else:
        typer.echo(f"training loss of step {steps:,}: {run.loss[-1]:.4f} (these data hold nothing out)")
    typer.echo(printable(f"model, for --model of other commands: {run.checkpoints()[-1].path}"))
    typer.echo(printable(f"next: {following}"))


@command
def dashboard(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or under way.")],
    out: Annotated[Path | None, typer.Option(help="The page; by default page.html in the folder.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Rewrite the page until the run ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the page of a run: losses, layers, learning rate, token losses, checkpoints. It opens offline.

    Example: `hooklens dashboard runs/shakespeare --watch`, then open runs/shakespeare/page.html in a browser

    With `--watch` the page is rewritten every few seconds until the run ends, and reloads itself.
    """
    from hooklens.studies.run_page import page_path, run_report, run_state, watch_run
    from hooklens.training.training_run import open_run

    known = judge({"run": lambda: open_run(run), "out": lambda: None if out is None else check_out(out)})
    opened = known["run"]
    page = page_path(opened, out)
    check_out(page)
    if not as_json:
        typer.echo(printable(f"page: {page.absolute()}"))
    if watch:
        state = watch_run(opened, page)
    else:
        run_report(opened).save(page)
        state = run_state(opened)
    typer.echo(json_line({"page": str(page.absolute()), "state": state}) if as_json else f"the run is {state}")
