"""One run of modular addition, analysed: when it grokked, its Fourier circuit, its norm, and where it generalised."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hooklens.core.errors import InputError, WrongType, did_you_mean
from hooklens.data.modular import Modular, modular_arithmetic
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.cost_table import CostTable, MeasuredModel, compare_costs
from hooklens.plugins.algorithmic.fourier.circles import Circles, project_embedding
from hooklens.plugins.algorithmic.fourier.demo_task import demo_modulus
from hooklens.plugins.algorithmic.fourier.frequency_ablation import (
    FrequencyAblation,
    ablate_logit_frequencies,
    ablate_neuron_frequencies,
)
from hooklens.plugins.algorithmic.fourier.frequency_sets import SmallestSet, find_smallest_set
from hooklens.plugins.algorithmic.fourier.key_frequencies import KeyFrequencies, find_key_frequencies
from hooklens.plugins.algorithmic.fourier.logit_formula import LogitFormula, fit_logit_formula
from hooklens.plugins.algorithmic.fourier.neuron_frequencies import NeuronFrequencies, classify_neurons
from hooklens.plugins.algorithmic.fourier.neuron_patching import NeuronPatching, patch_neurons, random_pairs
from hooklens.plugins.algorithmic.fourier.pair_table import run_pairs
from hooklens.plugins.algorithmic.fourier.plane_spectrum import PlaneSpectrum, measure_plane_spectrum
from hooklens.plugins.algorithmic.fourier.progress_measures import (
    Progress,
    excluded_loss,
    measure_progress,
    restricted_loss,
    task_of,
)
from hooklens.plugins.algorithmic.fourier.sum_directions import SumDirections, read_sum_directions
from hooklens.plugins.algorithmic.fourier.weight_spectra import FourierSpectrum, measure_fourier_spectrum
from hooklens.plugins.algorithmic.grokking.grokking_step import GrokkingStep, find_grokking
from hooklens.plugins.algorithmic.grokking.modular_recipes import check_table_size, weight_decay_of, without_decay
from hooklens.plugins.algorithmic.grokking.norm_drop import (
    CONTROLS,
    GROKKING,
    NO_DECAY,
    NormDrops,
    compare_norm_drops,
    squared_weights,
)
from hooklens.plugins.algorithmic.grokking.phases import Phases, find_phases
from hooklens.plugins.algorithmic.grokking.table_regions import TableRegions, measure_regions
from hooklens.plugins.algorithmic.task_of_run import kept_checkpoints
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table
from hooklens.training.run_folder import differences
from hooklens.training.training_run import Run, open_run
from hooklens.training.training_settings import Settings

_TERMS = {
    "what": "what was measured",
    "value": "here",
    "published": "the number of Nanda et al. (2023) for their run, where there is one",
}
_ANSWERS = 0.9  # of the unseen pairs: below, a circuit does not solve the task
_FAR_BELOW = 0.25  # of the loss on all pairs
_COMPARED = ("data", "config", "optimizer", "schedule", "loss", "batch", "clip", "precision")  # of run and control
_PATCHED = 8  # pairs of which every neuron is patched
_BETWEEN = 3  # checkpoints between memorisation and generalisation, below which there are no phases
#: Of the paper's run: p = 113, 30 % of the pairs, weight decay 1, one seed, 40,000 steps.
PUBLISHED: Mapping[str, str] = {
    "memorisation ends": "about 1,400",
    "generalised at step": "6,000 to 10,000",
    "key frequencies": "14, 35, 41, 42, 52",
    "number of key frequencies": "5",
    "neurons explained above 85 %": "433 of 512",
    "variance of the logits explained": "0.95",
}


@dataclass(frozen=True, eq=False)
class CircuitReadings(Result):
    """What the Fourier analysis finds in one model, over all pairs of its table.

    `loss` is that on all pairs, `training_loss` that on the training pairs, `chance` ln p. `restricted` (all pairs) and
    `excluded` (training pairs) are losses at the key frequencies, None if there is no key frequency. All are in nats.
    The parts that read key frequencies are None without one, too.
    """

    keys: KeyFrequencies
    neurons: NeuronFrequencies
    spectrum: FourierSpectrum
    formula: LogitFormula
    loss: float
    chance: float
    restricted: float | None
    excluded: float | None
    training_loss: float | None = None
    smallest: SmallestSet | None = None
    circles: Circles | None = None
    directions: SumDirections | None = None
    logit_ablation: FrequencyAblation | None = None
    neuron_ablation: FrequencyAblation | None = None
    plane: PlaneSpectrum | None = None
    patching: NeuronPatching | None = None

    @property
    def frequencies(self) -> list[int]:
        """The key frequencies by the neuron rule."""
        return self.keys.keys


@dataclass(frozen=True, eq=False)
class GrokkingStudy(Result):
    """One model that was trained on addition modulo p, and the run that trained it, where there is one.

    Without a run there is no grokking step, no progress over checkpoints, no phases and no norm. `halfway` has the
    regions at the checkpoint whose held-out accuracy is closest to one half: where the table is learnt first. `circuit`
    and `regions` are those of the last checkpoint, after `circuit_step` steps.
    """

    terms = _TERMS

    modulus: int
    seed: int
    fraction: float
    weight_decay: float
    n_steps: int
    setting: str
    circuit: CircuitReadings
    regions: TableRegions
    costs: CostTable
    grokking: GrokkingStep | None = None
    progress: Progress | None = None
    phases: Phases | None = None
    norms: NormDrops | None = None
    halfway: TableRegions | None = None
    halfway_step: int = 0
    circuit_step: int | None = None

    @property
    def is_published_setting(self) -> bool:
        """Whether p, fraction and weight decay are those of the paper's run."""
        return (self.modulus, self.fraction, self.weight_decay) == (113, 0.3, 1.0)

    def values(self) -> dict[str, Any]:
        """What the study found, by name: a row of a table over seeds."""
        step, circuit, known = self.grokking, self.circuit, {}
        if step is not None:
            known = {
                "verdict": step.verdict,
                "memorised at step": step.memorised_at,
                "memorisation ends": None if self.phases is None else self.phases.memorised,
                "cleanup begins": None if self.phases is None else self.phases.formed,
                "rise begins": step.rise_at,
                "generalised at step": step.generalised_at,
                "steps": self.n_steps,
            }
        n_neurons = len(circuit.neurons.explained)
        norms = dict[str, Any]()
        if step is not None:
            norms = {
                "drop of the squared norm at grokking": None if self.norms is None else self.norms.drop[0].item(),
                "largest drop of a control": None if self.norms is None else largest_control(self.norms),
            }
        return known | {
            "held-out accuracy": float(self.regions.accuracy[0]),
            "key frequencies": ", ".join(map(str, circuit.frequencies)) or "none",
            "number of key frequencies": len(circuit.frequencies),
            "neurons explained above 85 %": f"{circuit.neurons.n_explained} of {n_neurons}",
            "variance of the logits explained": circuit.formula.explained_centred,
            "loss, all pairs (nats)": circuit.loss,
            "loss, training pairs (nats)": circuit.training_loss,
            "restricted loss (nats)": circuit.restricted,
            "excluded loss (nats)": circuit.excluded,
            "ln p (nats)": circuit.chance,
            "smallest set within 1 %": None if circuit.smallest is None else circuit.smallest.size,
            "Gini of W_E": circuit.spectrum.gini_embedding,
            "Gini of W_L": circuit.spectrum.gini_neuron_logit,
            **norms,
            "weakest region": self.regions.weakest,
        }

    def table(self, n: int | None = None) -> Table:
        """Everything that was measured, beside the published numbers where the setting is the paper's."""
        published = PUBLISHED if self.is_published_setting else {}
        rows = [(name, cell(name, value), published.get(name)) for name, value in self.values().items()]
        columns = ("what", "value", "published") if published else ("what", "value")
        return Table(columns, [row[: len(columns)] for row in rows]).head(n)

    def figure(self) -> Any:
        """The grokking gap, or the table of pairs where there is no run."""
        return self.regions.figure() if self.grokking is None else self.grokking.figure()

    def findings(self) -> list[str]:
        """What the numbers say, as sentences."""
        said = [] if self.grokking is None else [self.grokking.statement]
        if self.circuit_step is not None and self.circuit_step < self.n_steps:
            said.append(
                f"What follows is the model of the last checkpoint, after step {self.circuit_step:,}; the run has "
                f"taken {self.n_steps:,}."
            )
        said.append(_circuit_sentence(self.circuit))
        accuracy = float(self.regions.accuracy[0])
        if self.circuit.frequencies and accuracy < _ANSWERS:
            said.append(
                f"This model answers {accuracy:.0%} of the unseen pairs: whatever these frequencies do in it, they are "
                "not a circuit that solves the task."
            )
        said += _causal_sentences(self.circuit)
        if self.phases is not None and self.phases.caveat:
            said.append(self.phases.caveat)
        if self.phases is None and self.progress is not None and self.grokking is not None and self.grokking.grokked:
            said.append(
                f"Phases are not read: fewer than {_BETWEEN} checkpoints lie between memorisation and generalisation."
            )
        if self.norms is not None:
            said.append(self.norms.statement)
        said.append(f"Generalisation: {self.regions.statement}")
        return said


def study_grokking(run: Run | str | os.PathLike, *, controls: Mapping[str, Run] | None = None) -> GrokkingStudy:
    """What happened in a run on addition modulo p, and what did its model learn?

    `run` is what `hl.train` returned, or its folder. `controls` are runs of the same setting that should not grok, by
    the names of `control_recipes`: with them, the drop of the weight norm can be evidence. A run that did not grok is
    studied all the same, and the result says so.

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability".
    """
    run = run if isinstance(run, Run) else open_run(run)
    given = {} if controls is None else controls
    if not isinstance(given, Mapping) or not all(isinstance(control, Run) for control in given.values()):
        raise WrongType(
            f"controls are runs by name, such as {{'weight decay 0': hl.open_run(...)}}; got {controls!r:.60}"
        )
    data = task_of(run)
    for name, control in given.items():
        check_control(name, control, run)
    check_table_size(data.p, data.fraction)
    kept = kept_checkpoints(run)
    grokking, model = find_grokking(run), kept[-1].load()
    circuit = read_circuit(model, data)
    progress = measure_progress(run, frequencies=circuit.frequencies) if circuit.frequencies else None
    phases = None
    memorised, generalised = grokking.memorised_at, grokking.generalised_at
    if progress is not None and memorised is not None and generalised is not None:
        between = (progress.steps > memorised) & (progress.steps <= generalised)
        if int(between.sum()) >= _BETWEEN:
            phases = find_phases(progress.steps, progress.excluded, progress.held_out_loss, generalised_at=generalised)
    halfway_step, halfway = _halfway(run, data, progress) if grokking.generalised_at is not None else (0, None)
    regions = measure_regions(model, data)
    return GrokkingStudy(
        modulus=data.p,
        seed=data.seed,
        fraction=data.fraction,
        weight_decay=weight_decay_of(run.identity["settings"]["optimizer"]),
        n_steps=run.steps_done,
        setting=f"{_model_in_words(model)}; {_training_in_words(run)}",
        circuit_step=kept[-1].step,
        circuit=circuit,
        regions=regions,
        costs=_costs(model, data, circuit, regions),
        grokking=grokking,
        progress=progress,
        phases=phases,
        norms=_norms(run, grokking, data.seed, controls or {}),
        halfway=halfway,
        halfway_step=halfway_step,
    )


def study_grokked_model(model: HookedTransformer, data: Modular) -> GrokkingStudy:
    """What did a model learn of addition modulo p? The same without a run: no steps, no norm.

    >>> from hooklens.testing import tiny_model
    >>> study = study_grokked_model(tiny_model(d_vocab=8), modular_arithmetic(p=7, fraction=0.5))
    >>> study.circuit.frequencies, study.grokking is None
    ([], True)
    """
    if not isinstance(data, Modular):
        raise WrongType(f"data is hl.data.modular_arithmetic(...), with the pairs of training; got {data!r:.60}")
    check_table_size(data.p, data.fraction)
    circuit, regions = read_circuit(model, data), measure_regions(model, data)
    return GrokkingStudy(
        modulus=data.p,
        seed=data.seed,
        fraction=data.fraction,
        weight_decay=float("nan"),
        n_steps=0,
        setting=_model_in_words(model),
        circuit=circuit,
        regions=regions,
        costs=_costs(model, data, circuit, regions),
    )


def read_circuit(model: HookedTransformer, data: Modular) -> CircuitReadings:
    """The Fourier analysis of one model."""
    pairs = run_pairs(model, data)
    neurons = classify_neurons(pairs)
    keys = find_key_frequencies(model, data, table=pairs)
    used, trained = keys.keys, pairs.trained
    readings = CircuitReadings(
        keys=keys,
        neurons=neurons,
        spectrum=measure_fourier_spectrum(model, data),
        formula=fit_logit_formula(pairs, frequencies=used or None),
        loss=pairs.loss,
        chance=pairs.chance,
        restricted=restricted_loss(pairs.logits, used) if used else None,
        excluded=excluded_loss(pairs.logits, used, trained) if used and trained is not None else None,
        training_loss=None if trained is None else pairs.mean_over(pairs.losses, trained),
    )
    if not used:
        return readings
    return replace(
        readings,
        smallest=find_smallest_set(pairs) if pairs.loss < pairs.chance else None,  # the constant alone is as good
        circles=project_embedding(model, data, frequencies=used),
        directions=read_sum_directions(model, data, frequencies=used, table=pairs),
        logit_ablation=ablate_logit_frequencies(pairs),
        neuron_ablation=ablate_neuron_frequencies(model, data),
        plane=measure_plane_spectrum(pairs, site="logits"),
        patching=patch_neurons(model, data, *random_pairs(data.p, _PATCHED), neurons=neurons),
    )


def check_control(name: str, control: Run, run: Run) -> None:
    """Raise unless a run is what its name says: the same data, model and rule, without weight decay or shuffled."""
    if name not in CONTROLS:
        raise did_you_mean("control", name, CONTROLS)
    wanted, seen = _setting(run), _setting(control)
    if name == NO_DECAY:
        wanted["optimizer"] = without_decay(wanted["optimizer"])
    else:
        wanted["data"] = wanted["data"] | {"shuffled": True}
    if unlike := list(differences(wanted, seen, words="{0} is {2} and not {1}")):
        raise InputError(
            f"the run in {str(control.path)!r} is not the control {name!r} of this run: {'; '.join(unlike[:3])}; train "
            "those of control_recipes(recipe), as hl.studies.grok(recipe, out) does"
        )


def _setting(run: Run) -> dict[str, Any]:
    """What a run and its control have in common, but for what the control is about."""
    every = run.identity | run.identity["settings"]
    return {name: every[name] for name in _COMPARED}


def largest_control(norms: NormDrops) -> float | None:
    """The largest drop of a control; None without one."""
    drops = [drop for kind, drop in zip(norms.kinds, norms.drop.tolist(), strict=True) if kind != GROKKING]
    return max(drops) if drops else None


def _norms(run: Run, grokking: GrokkingStep, seed: int, controls: Mapping[str, Run]) -> NormDrops | None:
    """The drop over the rise of the held-out accuracy, in the run and in its controls; None if it did not grok."""
    if not grokking.grokked or grokking.rise_at is None or grokking.generalised_at is None:
        return None
    runs = {GROKKING: run, **controls}
    window = grokking.rise_at, grokking.generalised_at
    curves = [(kind, seed, *squared_weights(other, including=window)) for kind, other in runs.items()]
    return compare_norm_drops(curves, start=window[0], stop=window[1])


def _costs(model: HookedTransformer, data: Modular, circuit: CircuitReadings, regions: TableRegions) -> CostTable:
    """The row of the model in a table of costs; what it implements is said by the formula for its logits."""
    used = ", ".join(map(str, circuit.frequencies))
    implements = "no frequency explains 85 % of a neuron: no Fourier circuit"
    if used:
        explained = circuit.formula.explained_centred
        solves = "" if float(regions.accuracy[0]) >= _ANSWERS else "; does not solve the task"
        implements = f"cosines of w_k (a + b - c), k = {used}: {explained:.1%} of the centred logits{solves}"
    name, value = f"modulo {data.p}, seed {data.seed}", float(regions.accuracy[0])
    pair = torch.tensor([[0, 0, data.p]], device=model.W_U.device)
    row = MeasuredModel(name=name, model=model, inputs=pair, measure="accuracy", value=value, implements=implements)
    return compare_costs([row])


def _halfway(run: Run, data: Modular, progress: Progress | None) -> tuple[int, TableRegions | None]:
    """The regions at the checkpoint with a held-out accuracy closest to one half, if that is between 0.1 and 0.9."""
    if progress is None:
        return 0, None
    at = int((progress.held_out_accuracy - 0.5).abs().argmin())
    if not 0.1 <= float(progress.held_out_accuracy[at]) <= 0.9:
        return 0, None
    step = int(progress.steps[at])
    checkpoint = next(kept for kept in run.checkpoints() if kept.step == step)
    return step, measure_regions(checkpoint.load(), data)


def _model_in_words(model: HookedTransformer) -> str:
    cfg = model.cfg
    mlp = "no MLP" if cfg.attn_only else f"{cfg.d_mlp} neurons ({cfg.act_fn})"
    layers = "1 layer" if cfg.n_layers == 1 else f"{cfg.n_layers} layers"
    return f"{layers} of width {cfg.d_model}, {cfg.n_heads} heads of {cfg.d_head}, {mlp}"


def _training_in_words(run: Run) -> str:
    settings = Settings.from_json(run.identity["settings"])
    return f"{settings.optimizer}, warm-up {settings.schedule.warmup} steps, at most {run.identity['steps']:,} steps"


def _circuit_sentence(circuit: CircuitReadings) -> str:
    used = ", ".join(map(str, circuit.frequencies))
    n, total = circuit.neurons.n_explained, len(circuit.neurons.explained)
    if not used or circuit.restricted is None or circuit.excluded is None:
        return "No frequency explains 85 % of the variance of any neuron: this model has no Fourier circuit."
    return (
        f"Key frequencies by the neuron rule: {used}; {n} of {total} neurons ({n / total:.0%}) are explained above "
        f"85 % by one frequency.{_further(circuit.keys)} sum_k alpha_k cos w_k (a + b - c) at the key frequencies "
        f"explains {circuit.formula.explained_centred:.1%} of the variance of the centred logits. On all pairs the "
        f"loss is {circuit.loss:.3g} nats and the restricted loss {circuit.restricted:.3g}; on the training pairs the "
        f"loss is {circuit.training_loss:.3g} and the excluded loss {circuit.excluded:.3g}; ln p is "
        f"{circuit.chance:.3g}.{_above(circuit)}{_lower(circuit)}"
    )


def _above(circuit: CircuitReadings) -> str:
    """What an excluded loss above that of equal probabilities says."""
    if circuit.excluded is None or circuit.excluded <= circuit.chance:
        return ""
    return " Without the circuit the right answers have less than equal probabilities: what is left prefers wrong ones."


def _lower(circuit: CircuitReadings) -> str:
    """What a restricted loss far below the loss says."""
    if circuit.restricted is None or circuit.restricted > _FAR_BELOW * circuit.loss:
        return ""
    return " The restricted loss is far below the loss: on all pairs together, what it leaves out does harm."


def _further(keys: KeyFrequencies) -> str:
    """The frequencies that most of the other rules name, and the neuron rule does not."""
    others = list(keys.by_rule.values())[1:]
    votes = Counter(k for named in others for k in named if k not in keys.keys)
    further = sorted(k for k, count in votes.items() if 2 * count >= len(others))
    if not further:
        return ""
    named = ", ".join(map(str, further))
    return f" At least half of the other rules also name {named}, which the formula and the losses below leave out."


def _causal_sentences(circuit: CircuitReadings) -> list[str]:
    """What interventions on frequencies and neurons do."""
    said = []
    if circuit.neuron_ablation is not None:
        ablation = circuit.neuron_ablation
        losses = dict(zip(ablation.frequencies.tolist(), ablation.losses.tolist(), strict=True))
        keys = [losses[k] for k in circuit.frequencies]
        others = [k for k in losses if k not in circuit.frequencies]
        low, high = f"{min(keys):.3g}", f"{max(keys):.3g}"
        reach = low if low == high else f"between {low} and {high}"
        said.append(
            f"Removing one key frequency from the neurons takes the loss on all pairs from {circuit.loss:.3g} to "
            f"{reach} nats."
        )
        if others:
            said[-1] += _without_others({k: losses[k] for k in others}, circuit.loss, min(keys))
    if circuit.patching is not None:
        patching = circuit.patching
        share = patching.total / patching.gap
        reason = "What is missing from 100% goes past the MLP, or is not additive."
        if share >= 0.995:
            reason = "Only effects that are additive, and all of the MLP, must add up to 100%."
        said.append(
            f"The effects of all neurons, each patched alone, add up to {share:.0%} of the difference between the "
            f"clean and the corrupted logit difference, averaged over {_PATCHED} random pairs of prompts. {reason}"
        )
    return said


def _without_others(losses: Mapping[int, float], base: float, weakest_key: float) -> str:
    """What removing a frequency does that is not a key one."""
    most = max(losses, key=lambda k: losses[k])
    if losses[most] <= base:
        return " Removing another frequency does not raise the loss."
    said = f" Of the other frequencies, {most} matters most: without it the loss is {losses[most]:.3g}."
    if losses[most] <= weakest_key:
        return said
    return (
        f"{said} That is more than a key frequency costs: {most} is none only because of the threshold of 85 %, on "
        "which restricted and excluded loss depend too."
    )


#: What stands in a table for a number that there is not.
ABSENT: Mapping[str, str] = {
    "memorised at step": "never",
    "memorisation ends": "no phases",  # they need key frequencies, too
    "cleanup begins": "no phases",
    "rise begins": "did not generalise",
    "generalised at step": "never",
    "restricted loss (nats)": "no key frequency",
    "excluded loss (nats)": "no key frequency",
    "smallest set within 1 %": "not searched",
    "drop of the squared norm at grokking": "did not grok",
    "largest drop of a control": "not compared",
    "weakest region": "none: all are alike",
}


def cell(name: str, value: Any) -> Any:
    """A number as it is; why it is missing in words, because the column holds words too."""
    return ABSENT.get(name, "none") if value is None else value


def demo(model: HookedTransformer) -> GrokkingStudy | Needs:
    """The model on the table of its tokens, 7 at most; without a run."""
    p = demo_modulus(model, mlp=True)
    if isinstance(p, Needs) or p not in (5, 7, 11, 13) or model.cfg.d_vocab != p + 1 or model.cfg.n_ctx < 3:
        return p if isinstance(p, Needs) else Needs("6, 8, 12 or 14 tokens, one more than a prime")
    return study_grokked_model(model, modular_arithmetic(p, fraction=0.5))
