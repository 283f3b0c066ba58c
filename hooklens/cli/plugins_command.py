"""`hooklens plugins` and `run`."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooklens.cli.base import app
from hooklens.cli.options import AsJson, Device, Dtype, OfDtype, Seed, check_out, load_model, of_model
from hooklens.cli.output import say_how_long, show, written
from hooklens.core.errors import InputError, judge

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


@app.command()
def plugins(as_json: AsJson = False) -> None:
    """Which methods are installed, including those of other packages?

    Example: `hooklens plugins`
    """
    from hooklens.plugins import available
    from hooklens.results.table import Table

    rows = [(info.name, info.error or info.summary, info.package) for info in available()]
    show(Table(("plugin", "what it answers", "package"), rows), as_json, sentences=True)


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
    """Run a plugin's demo and print its result, on short prompts, or on token numbers if there is no tokenizer.

    Example: `hooklens run patch --model smollm2-135m-instruct --out patch.html`
    """
    from hooklens.cli import estimates
    from hooklens.plugins import find

    def check_seed() -> None:
        if model is not None and seed:
            raise InputError(f"--seed {seed} draws the tiny model, but --model {model} is given; leave out one of them")

    known = {"plugin": lambda: find(plugin), "seed": check_seed, "out": lambda: out and check_out(out)}
    info = judge({**known, **of_model(model, device)})["plugin"]
    answer = info.demo()
    loaded = _tiny(device, dtype, seed) if model is None else load_model(model, device, dtype)
    if model is not None and loaded.cfg.d_vocab:
        say_how_long(loaded, estimates.of_demo_of(loaded, info.module))
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


_TINY = (
    " Its model is tiny and random: this shows the form of the result, and its numbers mean nothing; "
    "--model smollm2-135m-instruct runs it on a trained one."
)


def _first_line(function: Any) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _tiny(device: str | None, dtype: Dtype | None, seed: int) -> "HookedTransformer":
    from hooklens.pretrained.loading import as_device, as_dtype
    from hooklens.testing import tiny_model

    return tiny_model(seed=seed).to(device=as_device(device) or "cpu", dtype=as_dtype(dtype and dtype.value))
