"""Does more weight decay give a more parsimonious circuit? Runs over weight decays and seeds, and their measures."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import path_of, real, seed_number, seeded, several
from hooklens.core.errors import ArgumentError, InputError, did_you_mean
from hooklens.core.progress_bar import progress
from hooklens.plugins.algorithmic.fourier.frequency_sets import find_smallest_set
from hooklens.plugins.algorithmic.fourier.key_frequencies import find_key_frequencies
from hooklens.plugins.algorithmic.fourier.pair_table import run_pairs
from hooklens.plugins.algorithmic.fourier.progress_measures import task_of
from hooklens.plugins.algorithmic.fourier.weight_spectra import measure_fourier_spectrum
from hooklens.plugins.algorithmic.grokking.grokking_step import find_grokking
from hooklens.plugins.algorithmic.grokking.modular_recipes import fast_recipe, weight_decay_of
from hooklens.plugins.algorithmic.task_of_run import kept_checkpoints
from hooklens.results.result import Result, Table
from hooklens.results.statistics import null_p
from hooklens.studies.grokking_runs import check_recipe, folder_name, train_recipe
from hooklens.training.run_folder import plain_json
from hooklens.training.training_run import Run, open_run

MEASURES = ("key frequencies", "Gini of W_E", "smallest set", "squared weights")
P, FRACTION, STEPS = 31, 0.5, 7_000  # so that 25 runs end within half an hour on 2 cores
DECAYS = (0.3, 0.6, 1.0, 2.0, 4.0)
_DRAWS = 9_999


@dataclass(frozen=True, eq=False)
class Parsimony(Result):
    """Every run with its weight decay, its verdict, and how parsimonious the circuit is that it learnt.

    A run that did not generalise has no circuit to measure: its `measures` are NaN, but for its squared weights. Fewer
    key frequencies, a smaller smallest set and a larger Gini coefficient are more parsimonious.
    """

    terms = {
        "verdict": "whether the run grokked",
        "generalised at": "the first evaluation with a held-out accuracy of at least 0.99",
        "held-out accuracy": "at the end",
        "key frequencies": "how many, by the neuron rule",
        "Gini of W_E": "of the norms of the embedding's Fourier components: 0 all equal, 1 a single one",
        "smallest set": "the fewest frequencies with a restricted loss at most 1 % above the loss on all pairs",
        "squared weights": "the sum of all squared weights at the end",
    }

    modulus: int
    weight_decay: Float[Tensor, "run"]
    seeds: list[int]
    verdicts: list[str]
    generalised_at: list[int | None]
    held_out_accuracy: Float[Tensor, "run"]
    measures: Float[Tensor, "run measure"]

    def correlation(self, measure: str) -> tuple[float, float]:
        """Spearman's rank correlation of weight decay and a measure over runs that generalised, and its p-value.

        A measure is one of those of the table, or "generalised at". The p-value is two-sided, from permutations of the
        weight decays. NaN with fewer than 5 runs, or if either does not vary.
        """
        values = self._of_circuits(measure)
        known = ~values.isnan()
        decays, values = _ranks(self.weight_decay[known]), _ranks(values[known])
        if len(values) < 5 or float(decays.var()) == 0 or float(values.var()) == 0:
            return float("nan"), float("nan")
        orders = torch.rand(_DRAWS, len(values), generator=seeded(0)).argsort(1)
        null = _correlations(decays[orders], values)
        rho = _correlations(decays[None], values)[0]
        return float(rho), float(null_p(rho.abs(), null.abs()))

    @property
    def statements(self) -> list[str]:
        """How many runs grokked, and how each measure goes with weight decay."""
        n = sum(verdict == "grokked" for verdict in self.verdicts)
        said = [f"{n} of {len(self.verdicts)} runs modulo {self.modulus} grokked."]
        others = [
            f"weight decay {decay:g}, seed {seed} ({verdict})"
            for decay, seed, verdict in zip(self.weight_decay.tolist(), self.seeds, self.verdicts, strict=True)
            if verdict != "grokked"
        ]
        if others:
            said.append(f"The others: {'; '.join(others)}.")
        for measure in ("generalised at", *MEASURES):
            rho, p = self.correlation(measure)
            known = int((~self._of_circuits(measure).isnan()).sum())
            said.append(f"{measure} against weight decay: Spearman {rho:.2f}, p {p:.2g}, {known} runs.")
        return said

    def _of_circuits(self, measure: str) -> Float[Tensor, "run"]:
        """A measure, NaN where a run did not generalise."""
        at = torch.full((len(self.generalised_at),), torch.nan, dtype=torch.float64)
        for i, step in enumerate(self.generalised_at):
            if step is not None:
                at[i] = step
        if measure == "generalised at":
            return at
        if measure not in MEASURES:
            raise did_you_mean("measure of parsimony", measure, ("generalised at", *MEASURES))
        return self.measures[:, MEASURES.index(measure)].masked_fill(at.isnan(), torch.nan)

    def table(self, n: int | None = None) -> Table:
        """One row per run."""
        columns = {
            "weight decay": self.weight_decay.tolist(),
            "seed": self.seeds,
            "verdict": self.verdicts,
            "generalised at": self.generalised_at,
            "held-out accuracy": self.held_out_accuracy.tolist(),
        }
        columns |= dict(zip(MEASURES, self.measures.T.tolist(), strict=True))
        return Table(tuple(columns), list(zip(*columns.values(), strict=True))).head(n)

    def figure(self) -> Any:
        """Every measure against weight decay, a point for each run that generalised."""
        from hooklens.viz.curves import scatter
        from hooklens.viz.small_multiples import panels

        drawn = []
        for measure in MEASURES:
            values = self._of_circuits(measure)
            known = ~values.isnan()
            labels = [f"seed {seed}" for seed, drawn_too in zip(self.seeds, known.tolist(), strict=True) if drawn_too]
            figure = scatter(self.weight_decay[known], values[known], labels, title=measure, x_title="weight decay")
            drawn.append(figure.update_xaxes(type="log"))
        return panels(drawn)


def sweep_parsimony(
    out: str | os.PathLike,
    *,
    weight_decays: Sequence[float | int] = DECAYS,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    p: int = P,
    fraction: float = FRACTION,
    steps: int = STEPS,
    device: Any = None,
) -> Parsimony:
    """Train a run for every weight decay and seed, each for all steps, and measure how parsimonious each circuit is.

    >>> import tempfile
    >>> sweep = sweep_parsimony(tempfile.mkdtemp(), weight_decays=[1.0], seeds=[0], p=5, fraction=0.6, steps=2)
    >>> sweep.verdicts
    ['did not grok: never memorised']

    Model and rate are those of `fast_recipe`. Every run has a folder of its own below `out`; the same call goes on with
    a sweep that was stopped.

    Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", section 5.3, report that
    weight decay is needed to grok and that more of it is faster; the sweep over measures of parsimony is ours.
    """
    folder = path_of(out, "out")
    decays = [real("weight_decays", decay, 0.0) for decay in several("weight_decays", weight_decays)]
    numbers = [seed_number(seed) for seed in several("seeds", seeds)]
    for name, values in (("weight_decays", decays), ("seeds", numbers)):
        if len(set(values)) < len(values):
            raise ArgumentError("{" + name + "} holds a value twice, whose runs would count twice: {0}", values)
    recipes = [
        fast_recipe(p, fraction=fraction, weight_decay=decay, seed=seed, steps=steps, solved_for=None)
        for decay in decays
        for seed in numbers
    ]
    folders = {folder / folder_name(recipe): recipe.changed(training={"checkpoints": 2}) for recipe in recipes}
    for path, recipe in folders.items():  # all of them before the first run is trained
        check_recipe(path, recipe)
    runs = []
    with progress("parsimony", len(folders), unit="runs") as advance:
        for path, recipe in folders.items():
            runs.append(train_recipe(recipe, path, device=device))
            advance(1)
    return compare_parsimony(runs)


def compare_parsimony(runs: Sequence[Run | str | os.PathLike]) -> Parsimony:
    """How parsimonious is the circuit of each of these runs on one table, by their weight decay?"""
    if not isinstance(runs, Sequence) or isinstance(runs, str) or not runs:
        raise InputError(f"a comparison needs a list of at least one run, or folder of one; got {runs!r:.60}")
    opened = [run if isinstance(run, Run) else open_run(run) for run in runs]
    identities = [plain_json(run.identity) for run in opened]
    if len(set(identities)) < len(identities):
        twice = next(str(run.path) for i, run in enumerate(opened) if identities[i] in identities[:i])
        raise InputError(f"each run counts once, and that in {twice!r} is the same as one before it; leave it out")
    tasks = [task_of(run) for run in opened]
    if len({task.p for task in tasks}) > 1:
        raise InputError(f"these runs were trained on several p: {sorted({task.p for task in tasks})}; compare one")
    found_in = [find_grokking(run) for run in opened]
    return Parsimony(
        modulus=tasks[0].p,
        weight_decay=torch.tensor(
            [weight_decay_of(run.identity["settings"]["optimizer"]) for run in opened], dtype=torch.float64
        ),
        seeds=[task.seed for task in tasks],
        verdicts=[step.verdict for step in found_in],
        generalised_at=[step.generalised_at for step in found_in],
        held_out_accuracy=torch.stack([step.held_out_accuracy[-1] for step in found_in]),
        measures=torch.stack([_measures(run) for run in opened]),
    )


def _measures(run: Run) -> Float[Tensor, "measure"]:
    """The measures of the last model; NaN for one that does not generalise."""
    data, model = task_of(run), kept_checkpoints(run)[-1].load()
    squares = sum(float(weight.detach().double().square().sum()) for weight in model.parameters())
    if find_grokking(run).generalised_at is None:
        return torch.tensor([torch.nan, torch.nan, torch.nan, squares], dtype=torch.float64)
    pairs = run_pairs(model, data)
    n_keys = len(find_key_frequencies(pairs).keys)
    size = find_smallest_set(pairs).size if pairs.loss < pairs.chance else None
    gini = measure_fourier_spectrum(model, data).gini_embedding
    values = [float(n_keys), gini, torch.nan if size is None else float(size), squares]
    return torch.tensor(values, dtype=torch.float64)


def _ranks(values: Float[Tensor, "run"]) -> Float[Tensor, "run"]:
    """Ranks from 0, ties with their mean."""
    below = (values[:, None] > values[None]).double().sum(1)
    equal = (values[:, None] == values[None]).double().sum(1)
    return below + (equal - 1) / 2


def _correlations(left: Float[Tensor, "draw run"], right: Float[Tensor, "run"]) -> Float[Tensor, "draw"]:
    left, right = left - left.mean(1, keepdim=True), right - right.mean()
    return left @ right / (left.norm(dim=1) * right.norm())
