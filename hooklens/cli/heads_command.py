"""`hooklens heads`."""

from pathlib import Path
from typing import Annotated

import typer

from hooklens.cli.base import app
from hooklens.cli.options import (
    DEFAULT,
    Answer,
    AsJson,
    Clean,
    Corrupted,
    Device,
    Digests,
    Model,
    OfDtype,
    Out,
    PairsFile,
    Plans,
    Seed,
    WrongAnswer,
    check_out,
    check_pairs,
    load_model,
    load_reader,
    of_model,
    of_pair,
    pairs_of,
    plans_of,
    tokens_of,
)
from hooklens.cli.output import say_how_long, show, written
from hooklens.core.errors import judge


@app.command()
def heads(
    clean: Clean = None,
    corrupted: Corrupted = None,
    answer: Answer = None,
    wrong_answer: WrongAnswer = None,
    pairs: PairsFile = None,
    model: Model = DEFAULT,
    n: Annotated[
        int, typer.Option("--sequences", help="Random sequences for scores, and as many for effects; at least 6.")
    ] = 12,
    ioi: Annotated[
        int, typer.Option(help="Prompt pairs to label and measure name movers; a multiple of 4; 0: none.")
    ] = 128,
    registered: Plans = None,
    digest: Digests = None,
    out: Out = Path("heads.html"),
    device: Device = None,
    dtype: OfDtype = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Which heads are previous-token, duplicate-token, induction or copy-suppression heads, and on what evidence?

    With prompt pairs, also: which heads carry the answer there? They are chosen on half of the pairs, measured on the
    other half.

    Example: `hooklens heads --pairs ioi.jsonl --out heads.html`
    """
    from hooklens.cli import estimates
    from hooklens.plugins.heads import classify_heads
    from hooklens.plugins.heads.taxonomy import check_pairs_asked, check_sizes
    from hooklens.studies import study_heads
    from hooklens.studies.heads_page import taxonomy_report

    pair = (clean, corrupted, answer, wrong_answer)
    own = pairs is not None or any(given is not None for given in pair)
    checks = {
        "out": lambda: check_out(out),
        "registered": lambda: plans_of(registered, digest),
        "pairs": lambda: pairs_of(pairs, *pair) if own else None,
        **of_pair(*pair),
        "n": lambda: check_sizes(n),
        "ioi": lambda: check_pairs_asked(ioi),
        **of_model(model, device),
    }
    known = judge(checks)
    plans, read = known["registered"], known["pairs"]
    loaded = load_model(model, device, dtype) if read is None else load_reader(model, device, dtype)
    if read is not None:
        check_pairs(loaded, read, pairs)
    own_pairs = 0.0 if read is None else estimates.of_head_study(loaded, tokens_of(loaded, read))
    say_how_long(loaded, own_pairs + estimates.of_heads(loaded, n, 0 if loaded.tokenizer is None else ioi))
    found = classify_heads(loaded, n=n, ioi=ioi, seed=seed)
    if read is None:
        taxonomy_report(found, loaded, registered=plans).save(out, data=found)
        told = "Heads on random sequences that repeat: attention, the loss increase without it, and the control."
        show(found.table(20), as_json, caption=told, more={"names": found.note, **written(out)})
        return
    study = study_heads(loaded, read, labels=found.labels(), seed=seed)
    taxonomy_report(found, loaded, study.report(), registered=plans).save(out, data={"taxonomy": found, "pairs": study})
    told = "The decrease of the logit difference without what each head carries, the largest first."
    show(study.table(20), as_json, caption=told, more=written(out))
