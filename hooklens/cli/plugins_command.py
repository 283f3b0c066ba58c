"""`hooklens plugins` and `run`."""

import inspect
from typing import TYPE_CHECKING, Annotated

import typer

from hooklens.cli.base import command, say
from hooklens.cli.options import AsJson, ReportOptions
from hooklens.cli.output import show
from hooklens.core.errors import InputError

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


@command
def plugins(as_json: AsJson = False) -> None:
    """Which methods are installed, including those of other packages?

    Example: `hooklens plugins`
    """
    from hooklens.plugins import available
    from hooklens.results.table import Table

    rows = [(info.name, info.error or info.summary, info.package) for info in available()]
    show(Table(("plugin", "what it answers", "package"), rows), as_json, sentences=True)


@command
def run(
    plugin: Annotated[str, typer.Argument(help="A name that `hooklens plugins` lists.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="By default a tiny random model.")] = None,
    *,
    settings: ReportOptions,
) -> None:
    """Run a plugin's demo and print its result, on short prompts, or on token numbers if there is no tokenizer.

    Example: `hooklens run patch --model smollm2-135m-instruct --out patch.html`
    """
    from hooklens.cli import estimates
    from hooklens.plugins import find
    from hooklens.viz.report import Report

    def check_seed() -> None:
        if model is not None and settings.seed:
            raise InputError(
                f"--seed {settings.seed} draws the tiny model, but --model {model} is given; leave out one of them"
            )

    info = settings.judge({"plugin": lambda: find(plugin), "seed": check_seed})["plugin"]
    demo = info.demo()
    loaded = _tiny(settings) if model is None else settings.load()
    if model is not None and loaded.cfg.d_vocab:
        say(*estimates.how_long(loaded, estimates.of_plugin(loaded, info)))
    result = demo(loaded)
    first_line = (inspect.getdoc(demo) or "").partition("\n")[0]
    told = f"A demo. {first_line}" + _TINY * (model is None)
    caption, terms, written = f"{info.summary}\n{told}", getattr(result, "terms", {}), {}
    if settings.out is not None:
        report = Report(f"{plugin} in {loaded.cfg.model_name}").text(info.summary).text(told)
        written = settings.write(report.figure(result.figure()).table(result.table(), "", terms), result)
    show(result.table(), settings.as_json, caption=caption, terms=terms, more=written)


_TINY = (
    " Its model is tiny and random: this shows the form of the result, and its numbers mean nothing; "
    "--model smollm2-135m-instruct runs it on a trained one."
)


def _tiny(settings: ReportOptions) -> "HookedTransformer":
    from hooklens.pretrained.loading import as_dtype, computing_device
    from hooklens.testing import tiny_model

    dtype = as_dtype(settings.dtype)
    return tiny_model(seed=settings.seed).to(device=computing_device(settings.device) or "cpu", dtype=dtype)
