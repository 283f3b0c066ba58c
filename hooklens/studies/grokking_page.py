"""The report page of runs that should grok: every finding as a sentence, with its numbers and pictures."""

from collections.abc import Sequence
from typing import Any

from hooklens.core.arguments import several
from hooklens.core.errors import InputError, WrongType
from hooklens.results.result import Table
from hooklens.studies.grokking_study import PUBLISHED, CircuitReadings, GrokkingStudy, cell

_SETTING = (
    "One layer reads 'a b =' and is trained on a part of the table of a + b modulo p; other pairs are held out. A "
    "run groks if the held-out accuracy reaches 0.99 at least twice as late as the training accuracy: thresholds of "
    "ours, because the papers name none."
)
_PUBLISHED = (
    "Published: Nanda et al. (2023), one seed of p = 113, 30 % of the pairs, weight decay 1, after 40,000 steps. "
    "A run that ends soon after it was solved has had less of the cleanup, in which more neurons settle on one "
    "frequency. Key frequencies of other seeds are others: their names do not matter, their number does."
)
_TERMS = {
    "verdict": "whether the run grokked, by the thresholds above",
    "memorised at step": "training accuracy at least 0.99",
    "memorisation ends": "the smallest excluded loss",
    "cleanup begins": "the last checkpoint with at least 0.9 of the largest held-out loss",
    "rise begins": "the last evaluation with a held-out accuracy below a quarter of the way from that at memorisation "
    "to 0.99",
    "generalised at step": "held-out accuracy at least 0.99",
    "key frequencies": "those of which the terms explain over 85 % of the variance of at least one neuron",
    "neurons explained above 85 %": "those with a frequency whose terms explain that share of their variance",
    "variance of the logits explained": "of centred logits, by sum_k alpha_k cos w_k (a + b - c) at key frequencies",
    "restricted loss (nats)": "the loss on all pairs with only the constant and the key frequencies' (a + b) terms",
    "excluded loss (nats)": "the training loss if only those terms are removed",
    "ln p (nats)": "the loss of equal probabilities for all answers",
    "smallest set within 1 %": "the fewest frequencies, of all, whose restricted loss is at most 1 % above the loss on "
    "all pairs; searched if there are key frequencies and the loss is below ln p",
    "Gini of W_E": "of the norms of the embedding's Fourier components: 0 if all are equal, near 1 if few are large",
    "Gini of W_L": "the same of the neuron-to-logit map W_out W_U",
    "drop of the squared norm at grokking": "the share of the sum of squares lost between the start of the rise "
    "and generalisation",
    "largest drop of a control": "the same in a run that should not grok",
    "weakest region": "of the table, by accuracy on unseen pairs",
}


def studies_of(studies: GrokkingStudy | Sequence[GrokkingStudy]) -> list[GrokkingStudy]:
    """The studies that one page can hold, at least one and all of one p; a study alone is a list of one."""
    listed = [studies] if isinstance(studies, GrokkingStudy) else list(several("studies", studies))
    if not all(isinstance(study, GrokkingStudy) for study in listed):
        raise WrongType(f"studies are those of study_grokking or study_grokked_model, got {studies!r:.80}")
    if len({study.modulus for study in listed}) > 1:
        moduli = sorted({study.modulus for study in listed})
        raise InputError(f"one table or page holds studies of one p, and these are of {moduli}; make one for each")
    return listed


def seeds_table(studies: GrokkingStudy | Sequence[GrokkingStudy]) -> Table:
    """One column per study and one row per measure, beside the published numbers.

    >>> from hooklens.data.modular import modular_arithmetic
    >>> from hooklens.studies.grokking_study import study_grokked_model
    >>> from hooklens.testing import tiny_model
    >>> study = study_grokked_model(tiny_model(d_vocab=8), modular_arithmetic(p=7, fraction=0.5))
    >>> seeds_table([study]).columns
    ('what', 'seed 0')
    """
    studies = studies_of(studies)
    columns = [study.values() for study in studies]
    names = list(dict.fromkeys(name for column in columns for name in column))
    published = any(study.is_published_setting for study in studies)
    rows = []
    for name in names:
        cells = [cell(name, column.get(name)) for column in columns]
        rows.append((name, *cells, PUBLISHED.get(name)) if published else (name, *cells))
    heads = [f"seed {study.seed}" for study in studies]
    return Table(("what", *heads, "published") if published else ("what", *heads), rows)


def together(studies: Sequence[GrokkingStudy]) -> list[str]:
    """What several seeds say together: how many grokked, with how many frequencies, and whether norms are evidence."""
    runs = [study.grokking for study in studies if study.grokking is not None]
    if len(runs) < 2:
        return []
    n_grokked = sum(run.grokked for run in runs)
    said = [f"{n_grokked} of {len(runs)} seeds grokked."]
    counts = [len(study.circuit.frequencies) for study in studies]
    sets = {tuple(study.circuit.frequencies) for study in studies}
    if max(counts):
        said.append(f"They use {min(counts)} to {max(counts)} key frequencies, in {len(sets)} different sets.")
    norms = [study.norms for study in studies if study.norms is not None]
    if norms:
        n_evidence = sum(norm.is_evidence for norm in norms)
        said.append(
            f"The squared norm drops by more than in both controls in {n_evidence} of the {len(norms)} seeds that "
            "grokked."
        )
    return said


def grokking_report(studies: GrokkingStudy | Sequence[GrokkingStudy]) -> Any:
    """The page of one or several studies of the same setting."""
    from hooklens.viz.report import Report

    studies = studies_of(studies)
    first = studies[0]
    seeds = {"seed" if len(studies) == 1 else "seeds": ", ".join(str(study.seed) for study in studies)}
    report = Report(f"Grokking addition modulo {first.modulus}").text(_SETTING)
    report.numbers({"p": first.modulus, "trained on": f"{first.fraction:.0%}", **seeds, "verdict": _verdicts(studies)})
    report.text(f"The model: {first.setting}.")
    for sentence in together(studies):
        report.text(sentence)
    if len(studies) == 1:
        for sentence in first.findings():
            report.text(sentence)
    published = _PUBLISHED if any(study.is_published_setting for study in studies) else ""
    report.table(seeds_table(studies), f"{published} {_meanings(first)}".strip())
    for study in studies:
        if len(studies) > 1:
            report.heading(f"Seed {study.seed}")
            for sentence in study.findings():
                report.text(sentence)
        _parts(report, study)
    return report


def _parts(report: Any, study: GrokkingStudy) -> None:
    """The pictures and tables of one study."""
    _run(report, study)
    _circuit(report, study.circuit)
    _table_of_pairs(report, study)
    report.heading("Costs")
    report.table(study.costs.table(), "What a prompt costs, and the accuracy on unseen pairs.", study.costs.terms)


def _run(report: Any, study: GrokkingStudy) -> None:
    """When it grokked, and what its losses and its norm did; nothing for a model without a run."""
    if study.grokking is not None:
        report.heading("The run")
        report.figure(
            study.grokking.figure(),
            "The grokking gap is the distance between the two curves of accuracy, along the axis of steps. Curves are "
            "drawn at evaluations; the training accuracy that says when a run memorised is that of every step.",
        )
    if study.progress is not None:
        report.figure(
            study.progress.figure(),
            "Progress at the checkpoints, with the key frequencies of the last one at all of them.",
        )
    if study.phases is not None:
        caption = "Phases by excluded loss; rules of ours for phases that are published."
        report.table(study.phases.table(), f"{caption} {study.phases.caveat}".strip())
    if study.norms is not None:
        report.figure(study.norms.figure(), "The window between the dashed lines is the rise of the held-out accuracy.")
        report.table(study.norms.table(), study.norms.statement, study.norms.terms)


def _circuit(report: Any, circuit: CircuitReadings) -> None:
    """What the last model does, read from weights and logits and by interventions."""
    report.heading("The circuit")
    report.figure(
        circuit.spectrum.figure(), "Numbers are embedded as waves of few frequencies if few components are large."
    )
    report.figure(circuit.neurons.figure())
    report.table(circuit.neurons.table(), "", circuit.neurons.terms)
    caption = "Each rule for key frequencies under its name; x marks the frequencies that it names, a point the others."
    report.figure(circuit.keys.figure(), f"{caption} The colour is a rule's score as a share of its largest.")
    with report.fold("What each rule is, and where it is published"):
        report.table(Table(("rule", "what it is"), list(circuit.keys.sources.items())), "")
    report.figure(circuit.formula.figure())
    shown: dict[str, Any] = {
        "The numbers n on the plane of each key frequency k, and on principal components. The colour is k n modulo p: "
        "its order is that of a circle of this frequency.": circuit.circles,
        "Whether neurons whose weights to the logits are waves read cos and sin of w (a + b).": circuit.directions,
        "The loss when the logits lose one frequency.": circuit.logit_ablation,
        "The loss when the neurons lose one frequency, and the rest of the model runs on.": circuit.neuron_ablation,
        "How few frequencies are as good as the model. They need not be the key frequencies.": circuit.smallest,
    }
    shown["The two-dimensional spectrum of all logits. What depends on a + b alone is on the diagonal blocks."] = (
        circuit.plane
    )
    caption = "The effect of patching each neuron from one pair into another, added up by frequency."
    shown[f"{caption} none: neurons without a frequency that explains them above 85 %."] = circuit.patching
    for caption, part in shown.items():
        if part is not None:
            report.figure(part.figure(), caption)


def _table_of_pairs(report: Any, study: GrokkingStudy) -> None:
    """Where in the table the answers are right."""
    caption = (
        "All unseen pairs, after the last step. Intervals as if pairs were independent, which those of a model are not."
    )
    report.heading("The table of pairs")
    report.figure(study.regions.figure(), caption)
    report.table(study.regions.table(), "The regions of this table.", study.regions.terms)
    if study.halfway is not None:
        accuracy = float(study.halfway.accuracy[0])
        caption = f"The same after step {study.halfway_step:,}, at a held-out accuracy of {accuracy:.2f}."
        report.figure(study.halfway.figure(), caption)
        report.table(study.halfway.table(), "The regions of this table.", study.halfway.terms)


def _verdicts(studies: Sequence[GrokkingStudy]) -> str:
    runs = [study.grokking for study in studies if study.grokking is not None]
    if not runs:
        return "no run, one model"
    if len(runs) == 1:
        return runs[0].verdict.partition(":")[0]
    return f"{sum(run.grokked for run in runs)} of {len(runs)} grokked"


def _meanings(study: GrokkingStudy) -> str:
    known = {name: _TERMS[name] for name in study.values() if name in _TERMS}
    return " ".join(f"{name}: {meaning}." for name, meaning in known.items())
