"""`hooklens circuit`."""

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
    PairsFile,
    Plans,
    Seed,
    WrongAnswer,
    check_out,
    check_pairs,
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
def circuit(
    clean: Clean = None,
    corrupted: Corrupted = None,
    answer: Answer = None,
    wrong_answer: WrongAnswer = None,
    pairs: PairsFile = None,
    edges: Annotated[int, typer.Option(help="The largest number of edges in the circuit.")] = 200,
    draws: Annotated[int, typer.Option(help="Random circuits to compare with, at least 100.")] = 100,
    full: Annotated[
        bool, typer.Option("--full", help="Also completeness, minimality and the curve over sizes: minutes per pair.")
    ] = False,
    model: Model = DEFAULT,
    registered: Plans = None,
    digest: Digests = None,
    out: Annotated[Path, typer.Option(help="The report; its numbers and the circuit are saved beside it.")] = Path(
        "circuit.html"
    ),
    device: Device = None,
    dtype: OfDtype = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Which edges between heads and MLPs carry an answer? Found on half of the pairs, tested on the other.

    Example: `hooklens circuit --pairs ioi.jsonl --edges 200 --out circuit.html`

    A single pair can only be tested on itself; the report says so.
    """
    from hooklens.cli import estimates
    from hooklens.plugins.circuits import circuit_graph
    from hooklens.plugins.circuits.faithfulness import check_draws
    from hooklens.studies import study_circuit
    from hooklens.studies.circuit_study import check_edges

    pair = (clean, corrupted, answer, wrong_answer)
    checks = {
        "out": lambda: check_out(out),
        "registered": lambda: plans_of(registered, digest),
        "pairs": lambda: pairs_of(pairs, *pair),
        **of_pair(*pair),
        "edges": lambda: check_edges(edges),
        "draws": lambda: check_draws(draws),
        **of_model(model, device),
    }
    known = judge(checks)
    plans, read = known["registered"], known["pairs"]
    loaded = load_reader(model, device, dtype)
    judge(
        {"pairs": lambda: check_pairs(loaded, read, pairs), "edges": lambda: check_edges(edges, circuit_graph(loaded))}
    )
    say_how_long(loaded, estimates.of_circuit(loaded, tokens_of(loaded, read), draws, full=full))
    study = study_circuit(loaded, read, edges=edges, full=full, draws=draws, seed=seed)
    study.report(registered=plans).save(out, data=study)
    kept = study.circuit.save_json(out.with_suffix(".circuit.json"))
    told = "The share of the logit difference that the circuit alone keeps, and random circuits with as many edges."
    show(study.table(), as_json, caption=told, more={**written(out), "circuit": kept.absolute()})
