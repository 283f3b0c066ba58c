"""Parts that several report pages share, and the page of a circuit that was transferred."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hooklens.plugins.circuits.circuit_transfer import CircuitTransfer
from hooklens.plugins.patching.activation import PatchSweep
from hooklens.results.account import RunAccount
from hooklens.results.claims import ClaimFamily, Registration, plans_met

if TYPE_CHECKING:
    from hooklens.viz.report import Report


def add_claims(
    report: "Report",
    claims_for: Callable[[Sequence[Registration]], ClaimFamily | None],
    registered: Sequence[Registration],
) -> None:
    """Add claims, each with the plan that was registered for it, and a sentence for each plan without a claim."""
    met, unmet = plans_met(claims_for(()), registered)
    claims = claims_for(met)
    if claims is not None:
        report.heading("Claims").claims(claims)
    for sentence in unmet:
        report.text(sentence)


def transfer_report(transfer: CircuitTransfer) -> "Report":
    """The page of a circuit that was transferred to another model."""
    from hooklens.viz.report import Report

    report = Report(f"A circuit of {transfer.source} in {transfer.target}")
    report.text(
        "Nodes were matched by label and by their effect on one half of the prompts; faithfulness is measured on "
        "the other. Matching roles do not imply matching mechanisms."
    )
    report.figure(transfer.figure()).table(transfer.table())
    report.heading("Matched nodes").figure(transfer.matching.figure()).table(transfer.matching.table())
    return report.heading("The circuit in the target").figure(transfer.mapped.circuit.figure())


def say_exactness(report: "Report", sweeps: list[PatchSweep]) -> "Report":
    """How many patches were run again, how far they differed, and what the sweeps cost."""
    work = ", ".join(f"{sweep.site} by {' x '.join(sweep.by)} {sweep.computed:.0%}" for sweep in sweeps)
    checked = RunAccount.joined(sweeps).exactness
    return report.text(f"Every patch is exact. {checked} The work done, as a share of the plain loop: {work}.")
