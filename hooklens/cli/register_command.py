"""`hooklens register`: a plan, written before the run."""

from pathlib import Path
from typing import Annotated

import typer

from hooklens.cli.base import command
from hooklens.cli.options import AsJson
from hooklens.cli.output import show
from hooklens.core.errors import judge


@command
def register(
    plan: Annotated[Path, typer.Argument(help="The file to write; one that exists is never overwritten.")],
    hypothesis: Annotated[str, typer.Option(help="The statement, as in the method's report.")],
    control: Annotated[str, typer.Option(help="The control of the effect, in the method's words.")],
    n: Annotated[int, typer.Option("--n", help="The number of prompts for the effect.")],
    metric: Annotated[str, typer.Option(help="The metric.")] = "logit_diff",
    threshold: Annotated[float, typer.Option(help="How far beyond 0 the effect must lie.")] = 0.0,
    below: Annotated[bool, typer.Option("--below", help="The effect should lie below 0.")] = False,
    model: Annotated[str, typer.Option("--model", "-m", help="The model's name, if the plan is for one only.")] = "",
    as_json: AsJson = False,
) -> None:
    """Register a claim before the run: `heads` and `circuit` compare their results with it (--registered).

    Example: `hooklens register plan.json --hypothesis "200 edges carry the answer" --threshold 0.5 --n 32
    --control "what random circuits keep, 97.5 % edge of 100"`, and after it `hooklens circuit --pairs ioi.jsonl
    --registered plan.json`

    The statements and controls of each command are listed in docs/claims.md. Publish the printed digest, and pass it to
    the run (`--digest`): without it the plan counts as self-dated.
    """
    from hooklens.results.claims import Registration
    from hooklens.results.claims.registration import check_new
    from hooklens.results.table import Table

    side = "below" if below else "above"
    checks = {
        "plan": lambda: check_new(plan),
        "hypothesis": lambda: Registration(hypothesis, metric, control, threshold, n, side=side, model=model),
    }
    registration = judge(checks)["hypothesis"].write(plan)
    columns = ("hypothesis", "metric", "control", "threshold", "side", "n")
    rows = [(name, getattr(registration, name)) for name in columns]
    more = {"plan": str(plan), "written": registration.written, "digest": registration.digest}
    show(Table(("plan", "value"), rows), as_json, more=more)
