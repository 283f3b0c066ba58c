"""`hooklens patch`: patch your own pair of prompts."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hooklens.cli.base import app, say
from hooklens.cli.options import (
    DEFAULT,
    AsJson,
    Device,
    Model,
    OfDtype,
    Seed,
    check_out,
    load_reader,
    of_model,
    of_pair,
)
from hooklens.cli.output import say_how_long, show, written
from hooklens.core.errors import judge


@app.command()
def patch(
    clean: Annotated[str, typer.Option(help="The prompt that the model answers correctly.")],
    corrupted: Annotated[str, typer.Option(help="The same prompt with one thing changed.")],
    answer: Annotated[str, typer.Option(help="The clean prompt's next token, often with a leading space.")],
    wrong_answer: Annotated[str, typer.Option(help="The corrupted prompt's next token.")],
    model: Model = DEFAULT,
    sites: Annotated[list[str] | None, typer.Option("--site", help="The site to patch; may be repeated.")] = None,
    by: Annotated[
        str | None, typer.Option(help="The grid, such as 'layer x head x pos', for the sites with these axes.")
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

    If a run is interrupted, the same command continues it. The seed chooses the patches that are checked against plain
    hooked passes.
    """
    sites = sites or ["resid_pre", "z"]
    from hooklens.cli import estimates
    from hooklens.data.prompt_pairs import PromptPairs
    from hooklens.studies.pair_study import check_pair, grids, study_pair
    from hooklens.sweeps.settings import engine

    words = of_pair(clean, corrupted, answer, wrong_answer)
    known = {"out": lambda: check_out(out), "sites": lambda: grids(sites, by), **words, **of_model(model, device)}
    asked = (model, clean, corrupted, answer, wrong_answer, str(by), str(dtype), str(device))
    parts = {name: _part(out, name, asked) for name in judge(known)["sites"]}
    loaded = load_reader(model, device, dtype)

    pair = PromptPairs(clean, corrupted, answer=answer, wrong_answer=wrong_answer)
    n_pos, swept = check_pair(loaded, pair, sites=sites, by=by)
    say_how_long(loaded, estimates.of_patch(loaded, n_pos, swept))

    say(*(f"continuing from {path}" for path in parts.values() if path.exists()))
    try:
        with engine(seed=seed):
            study = study_pair(loaded, pair, sites=sites, by=by, resume=parts)
    except KeyboardInterrupt:
        if kept := ", ".join(str(path) for path in parts.values() if path.exists()):
            say(f"finished work is kept in {kept}; the same command continues from there")
        raise
    study.report().save(out, data=study)
    for path in parts.values():
        path.unlink(missing_ok=True)
    one = study.any_sweep
    scale = "0 as in the corrupted run, 1 as in the clean one"
    scale = scale if one.defined else "nan: the two runs do not differ significantly"
    runs: dict[str, Any] = {"clean": round(one.clean, 4), "corrupted": round(one.corrupted, 4), "recovered": scale}
    caption = "The patches that changed the logit difference most; recovered: the share of clean minus corrupted."
    show(study.table(), as_json, caption=caption, more=runs | written(out))


def _part(out: Path, site: str, asked: tuple[str, ...]) -> Path:
    """Where a site's unfinished sweep is kept: another question has another file."""
    from hooklens.core.envelope import digest  # it brings torch, which help does not wait for

    question = digest(["\0".join(asked)])[:8]
    return out.with_name(f"{out.stem}.{site}.{question}.part")
