"""The report page of a probe study: accuracy, baselines, and the limits of what the numbers show."""

from typing import Any

from hooklens.plugins.probing.study import ProbeStudy
from hooklens.results.statistics import INTERVAL_TERMS, few_groups

_WHAT = {
    "what": "the labels that are read, and the baselines: the control task has random labels, the same for all "
    "occurrences of a token (or group), and selectivity is the accuracy on the real labels minus that on those"
}
_ACCURACY = {
    "balanced accuracy": "accuracy averaged within classes first",
    **INTERVAL_TERMS,
    "accuracy": "share right",
    "p": "how often shuffled labels reach this accuracy",
    "q": "the false discovery rate over all points",
}


def probe_report(study: ProbeStudy, title: str = "") -> Any:
    """Counts, a verdict in words, accuracy by layer, the baselines, and calibration."""
    from hooklens.viz.report import Report

    n, groups = len(study.label), int(study.group.max()) + 1
    report = Report(title or f"A {study.kind} probe: {study.task}").numbers(
        {
            "texts": n,
            "groups": groups,
            "classes": ", ".join(study.classes),
            "balanced accuracy": round(study.balanced_accuracy, 3),
            "p against shuffled labels": f"{study.p:.2g}",
        }
    )
    for sentence in verdicts(study):
        report.text(sentence)
    report.text("A label that can be read need not be used by the model: steer or ablate the direction to test it.")
    over = f"Intervals over groups, widened for the variance of refitting the probes{few_groups(groups, '; ')}."
    report.figure(study.figure(), f"{over} Choosing the best layer here would use the test texts.")
    caption = f"Out of fold, with the layer chosen in inner folds of other groups; {groups} groups."
    report.table(study.table(), caption, _WHAT | _ACCURACY)
    terms = {"point": "the point that the probe reads"} | _ACCURACY
    report.heading("By layer").table(study.top_points(10), _by_layer(study), terms)
    return report.heading("Calibration").figure(
        study.calibration.figure(),
        "Observed frequency of a class against the probability predicted by the probe, out of fold; on the diagonal "
        "the two agree.",
    )


def _by_layer(study: ProbeStudy) -> str:
    """The meaning of p and q of single layers, and their smallest possible values."""
    words, draws = "p against shuffled labels, q over all of these", len(study.point_null)
    if not draws:
        return f"{words}; no labels were shuffled."
    none = "no single layer can reach q 0.05: " if study.least_q > 0.05 else ""
    return f"{words}; {none}with {draws} draws the smallest q of a single layer is {study.least_q:.2g}."


def verdicts(study: ProbeStudy) -> list[str]:
    """The limits that the controls put on the accuracy, in sentences; empty if there are none.

    >>> from hooklens.testing import tiny_model
    >>> from hooklens.plugins.probing.probe_training import demo
    >>> verdicts(demo(tiny_model()))[0]
    'Shuffled labels are read as well (p ...): there is no evidence for the label.'
    """
    sentences = []
    if study.p > 0.05:
        sentences.append(f"Shuffled labels are read as well (p {study.p:.2g}): there is no evidence for the label.")
    value, low, high = study.over_embeddings()
    if not low > 0:
        sentences.append(
            "There is no evidence that the model's layers add anything: an embedding of the tokens does as well (probe "
            f"minus embedding {value:.3f}, 95 % [{low:.3f}, {high:.3f}])."
        )
    value, low, high = study.selectivity_interval()
    if not low > 0:
        learnt = (
            f"Random labels (one per {study.control_by}) are read as well from the same streams, so the probe may have "
            f"learnt the task by itself (selectivity {value:.3f}, 95 % [{low:.3f}, {high:.3f}])."
        )
        none = f"There is no control task here: {study.no_control}."
        sentences.append(none if study.control_by is None else learnt)
    return sentences
