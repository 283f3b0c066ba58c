"""The report page of a circuit that was transferred to another model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooklens.plugins.circuits.circuit_transfer import CircuitTransfer


def transfer_report(found: "CircuitTransfer") -> Any:
    """The transfer as a page."""
    from hooklens.viz.report import Report

    report = Report(f"A circuit of {found.source} in {found.target}")
    report.text(
        "Nodes were matched by label and by their effect on one half of the prompts; faithfulness is measured on "
        "the other. Matching roles do not imply matching mechanisms."
    )
    report.figure(found.figure()).table(found.table())
    report.heading("Matched nodes").figure(found.matching.figure()).table(found.matching.table())
    return report.heading("The circuit in the target").figure(found.mapped.circuit.figure())
