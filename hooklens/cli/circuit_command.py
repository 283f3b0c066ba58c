"""`hooklens circuit`."""

from pathlib import Path
from typing import Annotated

import typer

from hooklens.cli.base import command, say
from hooklens.cli.options import PairOptions, PlanOptions, ReportOptions, tokens_of
from hooklens.cli.output import show
from hooklens.core.errors import judge


@command
def circuit(
    pair: PairOptions,
    edges: Annotated[int, typer.Option(help="The largest number of edges in the circuit.")] = 200,
    draws: Annotated[int, typer.Option(help="Random circuits to compare with, at least 100.")] = 100,
    full: Annotated[
        bool, typer.Option("--full", help="Also completeness, minimality and the curve over sizes: minutes per pair.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The report; its numbers and the circuit are saved beside it.")] = Path(
        "circuit.html"
    ),
    *,
    plans: PlanOptions,
    settings: ReportOptions,
) -> None:
    """Which edges between heads and MLPs carry an answer? Found on half of the pairs, tested on the other.

    Example: `hooklens circuit --pairs ioi.jsonl --edges 200 --out circuit.html`

    A single pair can only be tested on itself; the report says so.
    """
    from hooklens.cli import estimates
    from hooklens.plugins.circuits import circuit_graph
    from hooklens.plugins.circuits.faithfulness import check_draws
    from hooklens.studies import study_circuit
    from hooklens.studies.circuit_study import check_edges, statement_of

    sizes = {"edges": lambda: check_edges(edges), "draws": lambda: check_draws(draws)}
    known = settings.judge({"registered": plans.read, "pairs": pair.read, **pair.checks(), **sizes})
    pairs, model = known["pairs"], settings.load_reader()
    judge({"pairs": lambda: pair.check(model, pairs), "edges": lambda: check_edges(edges, circuit_graph(model))})
    plans.check(known["registered"], lambda: [statement_of(n) for n in range(1, edges + 1)])
    say(*estimates.how_long(model, estimates.of_circuit(model, tokens_of(model, pairs), draws, full=full)))
    study = study_circuit(model, pairs, edges=edges, full=full, draws=draws, seed=settings.seed)
    written = settings.write(study.report(registered=known["registered"]), study)
    written["circuit"] = study.circuit.save_json(out.with_suffix(".circuit.json")).absolute()
    caption = "The share of the logit difference that the circuit alone keeps, and random circuits with as many edges."
    more = written | plans.unmet(study.claims(), known["registered"])
    show(study.table(), settings.as_json, caption=caption, more=more)
