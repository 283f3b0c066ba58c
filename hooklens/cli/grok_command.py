"""`hooklens grok`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooklens.cli.base import command, say
from hooklens.cli.options import AsJson, check_out
from hooklens.cli.output import show
from hooklens.core.errors import ArgumentError, InputError, judge

if TYPE_CHECKING:
    from hooklens.data.modular import Modular
    from hooklens.studies.grokking_study import GrokkingStudy
    from hooklens.training.run_recipe import Recipe

_FAST = "A smaller setting that groks in under two minutes; see docs."
_RUNS = "Folder of the runs; by default one below grokking_runs, named after the setting."


@dataclass(frozen=True)
class GrokOptions:
    """The setting of the run. Left out, it is that of the paper, or with --fast the small one."""

    fast: Annotated[bool, typer.Option("--fast", help=_FAST)] = False
    p: Annotated[int | None, typer.Option("--p", help="The modulus, a prime; by default 113, fast 43.")] = None
    fraction: Annotated[float | None, typer.Option(help="Share of pairs to train on; by default 0.3, fast 0.4.")] = None
    weight_decay: Annotated[float | None, typer.Option(help="By default 1.")] = None
    seed: Annotated[int | None, typer.Option(help="Of weights and split; by default 0.", min=0, max=2**32 - 1)] = None
    seeds: Annotated[int, typer.Option(help="How many seeds to run, from --seed on.")] = 1
    steps: Annotated[int | None, typer.Option(help="Most steps of a run; by default 20000, fast 6000.")] = None

    def recipe(self, seed: int) -> "Recipe":
        """The recipe of one seed."""
        from hooklens.plugins.algorithmic.grokking.modular_recipes import fast_recipe, grokking_recipe

        names = ("p", "fraction", "weight_decay", "steps")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return (fast_recipe if self.fast else grokking_recipe)(seed=seed, **given)

    @property
    def first_seed(self) -> int:
        """The seed of the first run."""
        return 0 if self.seed is None else self.seed

    def check(self) -> None:
        """Raise for options that no run can have."""
        if self.seeds < 1:
            raise ArgumentError("{seeds} is how many runs to train, at least 1; got {0}", self.seeds)
        if self.first_seed + self.seeds > 2**32:
            raise ArgumentError("{seeds} count from {seed} {0} up to 2**32 - 1; got {1}", self.first_seed, self.seeds)
        self.recipe(self.first_seed)


@command
def grok(
    run: Annotated[
        Path | None, typer.Option(help="Analyse the finished or stopped run in this folder instead.")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Analyse this checkpoint instead.")] = None,
    runs: Annotated[Path | None, typer.Option(help=_RUNS)] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also train the two controls: three times as long.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...; by default cpu.")] = None,
    out: Annotated[Path, typer.Option(help="The report; its numbers go beside it as .json.")] = Path("grokking.html"),
    as_json: AsJson = False,
    *,
    options: GrokOptions,
) -> None:
    """Train a transformer on addition modulo p until it groks, and find the Fourier circuit that it learnt.

    Example: `hooklens grok --fast`, or `hooklens grok --seeds 5 --controls --device cuda`

    The same command continues runs that were stopped. A run that did not grok is reported as such.
    """
    from hooklens.pretrained.loading import computing_device
    from hooklens.studies.grokking_page import grokking_report, seeds_table

    checks = {"out": lambda: check_out(out), "device": lambda: computing_device(device), "options": options.check}
    known = judge(
        {
            **checks,
            "run": lambda: _check_source(
                run, model, options, {"--controls": controls, "--runs": runs, "--device": run and device}
            ),
        }
    )
    if run is not None or model is not None:
        studies = [_analysed(run, model, options, known["device"])]
    else:
        studies = _trained(options, runs, controls=controls, device=known["device"])
    path = grokking_report(studies).save(out, data=studies)
    written = {"report": path.absolute(), "numbers": path.with_suffix(".json").absolute()}
    caption = f"Addition modulo {studies[0].modulus}"
    show(seeds_table(studies), as_json, caption=caption, more=_sentences(studies, as_json) | written)


def _sentences(studies: "list[GrokkingStudy]", as_json: bool) -> dict[str, str]:
    """The findings: one entry for each seed in JSON, one line for each finding in a terminal."""
    if as_json:
        return {f"seed {study.seed}": " ".join(study.findings()) for study in studies}
    several = len(studies) > 1
    return {
        (f"seed {study.seed}, finding {i}" if several else f"finding {i}"): finding
        for study in studies
        for i, finding in enumerate(study.findings(), 1)
    }


def _check_source(run: Path | None, model: Path | None, options: GrokOptions, others: Mapping[str, Any]) -> None:
    """Raise for options that say how to train where nothing is trained: they would have no effect.

    `others` are further such options, each with its value.
    """
    if run is not None and model is not None:
        raise InputError("--run has checkpoints of its own, so --model cannot be given too; give one of them")
    if run is None and model is None:
        return
    read = {"p"} if run is not None else {"p", "fraction", "seed", "fast"}
    changed = [field.name for field in fields(GrokOptions) if getattr(options, field.name) != field.default]
    unused = [f"--{name.replace('_', '-')}" for name in changed if name not in read]
    unused += [name for name, value in others.items() if value]
    if unused:
        source = "--run" if run is not None else "--model"
        raise InputError(f"{source} trains nothing, so {', '.join(unused)} would have no effect; leave them out")


def _task_of(model: Path, options: GrokOptions) -> "Modular":
    """The pairs a checkpoint was trained on: those of the run it lies in, or of the options for a file of its own."""
    from hooklens.data.modular import modular_arithmetic
    from hooklens.plugins.algorithmic.fourier.progress_measures import task_of

    run = model.resolve().parent.parent
    if not (run / "run.json").is_file():
        unsaid = ("seed",) if options.fast else ("p", "fraction", "seed")
        missing = [name for name in unsaid if getattr(options, name) is None]
        if missing:
            raise InputError(
                f"--model {str(model)!r} lies in no run, so it does not say on which pairs it was trained; give "
                f"{', '.join('--' + name for name in missing)} too, or a checkpoint in the folder of its run"
            )
        asked = options.recipe(options.first_seed).data
        return modular_arithmetic(asked["p"], fraction=asked["fraction"], seed=asked["seed"])
    data = task_of(run)
    if options.fast:
        raise InputError(
            f"--model {str(model)!r} lies in a run, which says on which pairs it was trained, so --fast would have no "
            "effect; leave it out"
        )
    for name in ("p", "fraction", "seed"):
        given, there = getattr(options, name), getattr(data, name)
        if given not in (None, there):
            raise InputError(
                f"--model {str(model)!r} lies in a run that was trained on {name} = {there}, and --{name} {given} is "
                "asked for; leave it out"
            )
    return data


def _analysed(run: Path | None, model: Path | None, options: GrokOptions, device: Any) -> "GrokkingStudy":
    """The study of a run that is there, or of one model."""
    from hooklens.model.config import TokenEmbed
    from hooklens.plugins.algorithmic.fourier.progress_measures import task_of
    from hooklens.pretrained.loading import load
    from hooklens.studies.grokking_study import study_grokked_model, study_grokking
    from hooklens.training.training_run import open_run

    if model is not None:
        task, loaded = _task_of(model, options), load(str(model), device=device)
        if not isinstance(loaded.cfg.embed, TokenEmbed):
            raise InputError(f"--model needs a model of 'a b =', and {str(model)!r} reads vectors, not numbers")
        return study_grokked_model(loaded, task)
    assert run is not None
    opened = open_run(run)
    trained_on = task_of(opened).p
    if options.p not in (None, trained_on):
        raise InputError(f"--run {str(run)!r} was trained on p = {trained_on}, and --p {options.p} is asked for")
    return study_grokking(opened)


def _trained(options: GrokOptions, runs: Path | None, *, controls: bool, device: Any) -> "list[GrokkingStudy]":
    """Train every seed, or go on with it, and study it."""
    from hooklens.cli import estimates
    from hooklens.studies.grokking_runs import check_recipe, folder_name, grok, steps_taken

    recipes = [options.recipe(seed) for seed in range(options.first_seed, options.first_seed + options.seeds)]
    folders = [(runs or Path("grokking_runs")) / folder_name(recipe) for recipe in recipes]
    for recipe, folder in zip(recipes, folders, strict=True):  # all of them before the first run is trained
        check_recipe(folder / "run", recipe)
    new = sum(not (folder / "run" / "run.json").is_file() for folder in folders)
    if new:
        n_steps = recipes[0].training["steps"] * new * (3 if controls else 1)
        say(*estimates.announced(estimates.of_training(recipes[0], device) * n_steps, at_most=True))
    studies = []
    try:
        for recipe, folder in zip(recipes, folders, strict=True):
            if (taken := steps_taken(folder / "run")) is not None:
                say(f"going on with the run in {folder / 'run'}, which has taken {taken:,} steps")
            studies.append(grok(recipe, folder, controls=controls, device=device))
    except KeyboardInterrupt:
        say("stopped; the same command goes on from there")
        raise
    return studies
