"""`hooklens lens`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hooklens.cli.base import app
from hooklens.cli.options import (
    DEFAULT,
    Answer,
    AsJson,
    Device,
    Model,
    OfDtype,
    Out,
    PairsFile,
    WrongAnswer,
    check_out,
    load_reader,
    of_model,
    of_pair,
    pairs_of,
    tokens_of,
)
from hooklens.cli.output import say_how_long, show, written
from hooklens.core.errors import InputError, judge

if TYPE_CHECKING:
    from hooklens.data.prompt_pairs import PromptPairs
    from hooklens.results.table import Table
    from hooklens.studies import LensStudy


@app.command()
def lens(
    prompt: Annotated[str | None, typer.Argument(help="A prompt; or --pairs, whose clean prompts are read.")] = None,
    answer: Answer = None,
    wrong_answer: WrongAnswer = None,
    pairs: PairsFile = None,
    model: Model = DEFAULT,
    out: Out = Path("lens.html"),
    device: Device = None,
    dtype: OfDtype = None,
    as_json: AsJson = False,
) -> None:
    """What would the model predict after every layer, and which components write its answer?

    Example: `hooklens lens "When Mary and John went to the store, John gave a drink to" --answer " Mary" --wrong-answer
    " John"`
    """

    def prompts() -> "PromptPairs | None":
        if (prompt is None) == (pairs is None):
            raise InputError("give either PROMPT or --pairs file.jsonl")
        return None if pairs is None else pairs_of(pairs, None, None, answer, wrong_answer)

    known = {"out": lambda: check_out(out), "pairs": prompts, **of_pair(None, None, answer, wrong_answer)}
    read = judge({**known, **of_model(model, device)})["pairs"]
    loaded = load_reader(model, device, dtype)
    from hooklens.cli import estimates
    from hooklens.results.table import Table
    from hooklens.studies import study_lens

    if read is None:
        say_how_long(loaded, estimates.of_lens(loaded, len(loaded.to_tokens(str(prompt))[0])))
        study = study_lens(loaded, str(prompt), answer=answer, wrong_answer=wrong_answer, names=["the prompt"])
        study.report().save(out, data=study)
        layers = study.lenses[0].table()
        _show_lens(study, as_json, ("The stream's prediction after each layer.", layers), study.lenses[0].terms, out)
        return
    from hooklens.data.jsonl import check_pairs

    check_pairs(loaded, read, str(pairs), corrupted=False)
    say_how_long(loaded, estimates.of_lens(loaded, tokens_of(loaded, read)))
    names = [f"line {line}" for line in read["line"]]
    study = study_lens(
        loaded, read.clean, answer=read.answer, wrong_answer=read.wrong_answer, group=read.group, names=names
    )
    told = f"the clean prompts of all {len(read)} lines; a lens does not read the corrupted ones"
    study.report().text(f"Read from {pairs}: {told}.").save(out, data=study)
    path = study.trajectory.table()
    layers = Table(path.columns, [row for row in path.rows if not str(row[0]).endswith("_mid")])
    before = ("Layer by layer: medians of ranks, means of the other columns, over prompts.", layers)
    _show_lens(study, as_json, layers=before, terms=study.trajectory.terms, out=out, more={"read": told})


def _show_lens(
    study: "LensStudy",
    as_json: bool,
    layers: tuple[str, "Table"],
    terms: Mapping[str, str],
    out: Path,
    more: Mapping[str, str] | None = None,
) -> None:
    controls = "; ".join(f"{name}: {terms[name]}" for name in layers[1].columns if name.startswith("control"))
    caption = "Direct contribution of each component to the answer's logit, the largest first; compare it "
    show(
        study.table(),
        as_json,
        caption=f"{caption}with the spread over tokens.",
        before={"layers": (f"{layers[0]} {controls}.", layers[1])},
        more={**(more or {}), **written(out)},
    )
