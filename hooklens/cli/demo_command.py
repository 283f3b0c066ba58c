"""`hooklens demo`: indirect objects in a real model."""

from pathlib import Path
from typing import Annotated

import typer

from hooklens.cli.base import app
from hooklens.cli.options import DEFAULT, AsJson, Device, Model, OfDtype, Seed, check_out, load_reader, of_model
from hooklens.cli.output import say_how_long, show, written
from hooklens.core.errors import judge


@app.command()
def demo(
    model: Model = DEFAULT,
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
    from hooklens.data.indirect_object import check_n_pairs, ioi

    judge({"out": lambda: check_out(out), "n": lambda: check_n_pairs(n), **of_model(model, device)})
    loaded = load_reader(model, device, dtype)
    from hooklens.cli import estimates
    from hooklens.studies.ioi_study import study_ioi

    say_how_long(loaded, estimates.of_demo(loaded, n, int(ioi(loaded, n, seed=seed)["end"][0]) + 1))
    study = study_ioi(loaded, n, seed=seed)
    study.report().save(out, data=study)
    halves = "labelled on one half of the pairs, measured on the other" if study.held_out else "all on the same pairs"
    caption = f"Heads, {halves}. patched, direct: the share of the clean-corrupted difference restored."
    show(study.table(), as_json, caption=caption, more={"finding": study.finding(), **written(out)})
