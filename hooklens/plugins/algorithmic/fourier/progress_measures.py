"""Progress measures: restricted and excluded loss, sparsity and weights over the checkpoints of a run."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.progress_bar import progress
from hooklens.data.modular import Modular, modular_arithmetic
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.fourier.basis import checked_frequencies, keep_frequencies, mean_by_sum, sums
from hooklens.plugins.algorithmic.fourier.demo_task import demo_modulus
from hooklens.plugins.algorithmic.fourier.key_frequencies import find_key_frequencies
from hooklens.plugins.algorithmic.fourier.logit_formula import Logits, formula_coefficients
from hooklens.plugins.algorithmic.fourier.pair_table import (
    Task,
    cross_entropy,
    need_logits,
    need_trained,
    run_pairs,
    tabulate,
)
from hooklens.plugins.algorithmic.fourier.weight_spectra import measure_fourier_spectrum
from hooklens.plugins.algorithmic.task_of_run import kept_checkpoints, trained_task
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table
from hooklens.training.training_run import Run, open_run


def restricted_logits(logits: Logits, frequencies: Iterable[int]) -> Logits:
    """The logits with nothing but their mean over all pairs and their terms in cos w_k (a + b) and sin w_k (a + b).

    >>> ones = torch.ones(5, 5, 5, dtype=torch.float64)
    >>> bool(torch.allclose(restricted_logits(ones, [1]), ones))
    True
    """
    need_logits(logits)
    return logits.double().mean((0, 1)) + _sum_terms(logits.double(), frequencies)


def excluded_logits(logits: Logits, frequencies: Iterable[int]) -> Logits:
    """The logits without their terms in cos w_k (a + b) and sin w_k (a + b) of these frequencies."""
    need_logits(logits)
    return logits.double() - _sum_terms(logits.double(), frequencies)


def restricted_loss(logits: Logits, frequencies: Iterable[int]) -> float:
    """The loss on all pairs when only the constant and the (a + b) terms of these frequencies are kept.

    Each logit is a function of (a, b). It is projected on cos w_k (a + b) and sin w_k (a + b) of the frequencies, and
    the mean over all pairs is added again, as in the authors' notebook ("bias correction").

    >>> from hooklens.plugins.algorithmic.fourier.logit_formula import formula_logits
    >>> logits = formula_logits(7, {2: 9.0})
    >>> abs(restricted_loss(logits, [2]) - cross_entropy(logits).mean().item()) < 1e-12
    True

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", section 5.1.
    """
    logits = tabulate(logits).logits
    p = len(logits)
    by_sum = mean_by_sum(logits)
    kept = by_sum.mean(0) + keep_frequencies(by_sum, checked_frequencies(frequencies, p))
    return float(torch.nn.functional.cross_entropy(kept, torch.arange(p)))


def excluded_loss(logits: Logits, frequencies: Iterable[int], trained: Bool[Tensor, "a b"]) -> float:
    """The loss on the training pairs when the (a + b) terms of these frequencies are removed; all else is kept.

    >>> from hooklens.plugins.algorithmic.fourier.logit_formula import formula_logits
    >>> trained = torch.rand(7, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    >>> loss = excluded_loss(formula_logits(7, {2: 9.0}), [2], trained)
    >>> abs(loss - torch.tensor(7.0).double().log().item()) < 1e-12
    True

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", section 5.1: only
    the cosines and sines of w_k (a + b) of the key frequencies are removed, on the training data.
    """
    need_trained(trained, need_logits(logits))
    logits = tabulate(logits, trained=trained).logits
    if not bool(trained.any()):
        raise InputError("the excluded loss is that of the training pairs, and trained marks none")
    losses = cross_entropy(excluded_logits(logits, checked_frequencies(frequencies, len(logits))))
    return float(losses[trained.cpu()].mean())


def _sum_terms(logits: Logits, frequencies: Iterable[int]) -> Logits:
    """The part of the logits in cos and sin of w_k (a + b): a function of the sum alone."""
    p = len(logits)
    kept = keep_frequencies(mean_by_sum(logits), checked_frequencies(frequencies, p))
    return kept[sums(p).to(logits.device)]


@dataclass(frozen=True, eq=False)
class Progress(Result):
    """Losses (in nats), accuracies, sparsity, squared weights and coefficients at every checkpoint of a run.

    `restricted` is the restricted loss on all pairs and `excluded` the excluded loss on the training pairs, with the
    key frequencies of the last checkpoint at every checkpoint. `coefficients` are those of cos w_k (a + b - c).
    """

    terms = {
        "restricted": "loss on all pairs with the constant and the key frequencies' (a + b) terms of the logits only",
        "excluded": "loss on the training pairs without the key frequencies' (a + b) terms of the logits",
        "Gini W_E": "Gini coefficient of the norms of the Fourier components of the embedding",
        "squared weights": "sum of the squares of all parameters",
    }

    modulus: int
    steps: Int[Tensor, "checkpoint"]
    frequencies: Int[Tensor, "key"]
    loss: Float[Tensor, "checkpoint"]
    train_loss: Float[Tensor, "checkpoint"]
    held_out_loss: Float[Tensor, "checkpoint"]
    train_accuracy: Float[Tensor, "checkpoint"]
    held_out_accuracy: Float[Tensor, "checkpoint"]
    restricted: Float[Tensor, "checkpoint"]
    excluded: Float[Tensor, "checkpoint"]
    coefficients: Float[Tensor, "checkpoint key"]
    gini_embedding: Float[Tensor, "checkpoint"]
    gini_neuron_logit: Float[Tensor, "checkpoint"]
    squared_weights: Float[Tensor, "checkpoint"]

    def table(self, n: int | None = None) -> Table:
        """One row a checkpoint."""
        columns = {
            "train loss": self.train_loss,
            "held-out loss": self.held_out_loss,
            "held-out accuracy": self.held_out_accuracy,
            "restricted": self.restricted,
            "excluded": self.excluded,
            "Gini W_E": self.gini_embedding,
            "squared weights": self.squared_weights,
        }
        values = zip(self.steps.tolist(), *(column.tolist() for column in columns.values()), strict=True)
        return Table(("step", *columns), list(values)).head(n)

    def figure(self) -> Any:
        """Losses, coefficients of the logit formula, Gini coefficients and squared weights over steps."""
        from hooklens.viz.curves import lines
        from hooklens.viz.small_multiples import panels

        losses = {
            "training": self.train_loss,
            "held out": self.held_out_loss,
            "restricted (all pairs)": self.restricted,
            "excluded (training)": self.excluded,
        }
        names = ", ".join(map(str, self.frequencies.tolist()))
        cosines = {f"frequency {k}": self.coefficients[:, i] for i, k in enumerate(self.frequencies.tolist())}
        sparsity = {"W_E": self.gini_embedding, "W_L": self.gini_neuron_logit}
        squares = {"squares": self.squared_weights}
        at: dict[str, Any] = {"x": self.steps, "x_title": "step"}
        return panels(
            [
                lines(losses, title=f"Losses; key frequencies {names}", y_title="nats", log="xy", **at),
                lines(cosines, title="Coefficients of cos w (a + b - c)", y_title="logits", log="x", **at),
                lines(sparsity, title="Gini coefficient of Fourier norms", y_title="Gini", log="x", **at),
                lines(squares, title="Sum of squared weights", y_title="sum of squares", log="x", **at),
            ]
        )


def measure_progress(run: Run | str | os.PathLike, *, frequencies: Sequence[int] | None = None) -> Progress:
    """How did the Fourier circuit grow during a run? Every measure at every checkpoint, from all p x p pairs.

    `run` is what `hl.train` returned on `hl.data.modular_arithmetic`, or its folder. `frequencies` default to the key
    frequencies of the last checkpoint by the neuron rule (see `find_key_frequencies`); a run without any is refused.
    The paper takes those with nontrivial coefficients in W_L (appendix C.2), for which the rule "gap in W_L" is ours.

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", section 5 and
    figure 7.
    """
    run, data = run if isinstance(run, Run) else open_run(run), task_of(run)
    kept = kept_checkpoints(run)
    if frequencies is None:
        frequencies = need_keys(find_key_frequencies(kept[-1].load(), data).keys, f"after {kept[-1].step} steps")
    frequencies = checked_frequencies(frequencies, data.p)
    with progress("checkpoints", len(kept), unit="checkpoint") as advance:
        rows = []
        for checkpoint in kept:
            rows.append((checkpoint.step, _measures(checkpoint.load(), data, frequencies)))
            advance(1)
    return _joined(rows, data.p, frequencies)


def task_of(run: Run | str | os.PathLike) -> Modular:
    """The task of a run, with its training pairs; refused if that is not modular addition."""
    return trained_task(run, "modular", modular_arithmetic)


def need_keys(keys: Sequence[int], when: str) -> list[int]:
    """The key frequencies; refused if there are none."""
    if not keys:
        raise InputError(
            f"no frequency explains a neuron above the threshold {when}: the model has no Fourier circuit, perhaps "
            "because it did not grok; train longer, or give frequencies=[...]"
        )
    return list(keys)


def _measures(model: HookedTransformer, data: Task, frequencies: Sequence[int]) -> dict[str, float | Tensor]:
    table = run_pairs(model, data, layer=None)
    spectrum = measure_fourier_spectrum(model, data)
    weights = [parameter.detach().double().square().sum() for parameter in model.parameters()]
    every = torch.ones_like(table.correct) if table.trained is None else table.trained
    return {
        "loss": table.loss,
        "train_loss": table.mean_over(table.losses, table.trained),
        "held_out_loss": table.mean_over(table.losses, table.held_out),
        "train_accuracy": table.mean_over(table.correct, table.trained),
        "held_out_accuracy": table.mean_over(table.correct, table.held_out),
        "restricted": restricted_loss(table.logits, frequencies),
        "excluded": excluded_loss(table.logits, frequencies, every),
        "coefficients": formula_coefficients(table.logits)[torch.tensor(list(frequencies)) - 1],
        "gini_embedding": spectrum.gini_embedding,
        "gini_neuron_logit": spectrum.gini_neuron_logit,
        "squared_weights": float(torch.stack(weights).sum()),
    }


def _joined(rows: list[tuple[int, dict[str, Any]]], p: int, frequencies: Sequence[int]) -> Progress:
    names = rows[0][1]
    columns = {name: torch.stack([torch.as_tensor(row[name]).double() for _, row in rows]) for name in names}
    steps = torch.tensor([step for step, _ in rows])
    return Progress(modulus=p, steps=steps, frequencies=torch.tensor(list(frequencies)), **columns)


def demo(model: HookedTransformer) -> Progress | Needs:
    """The model as the only checkpoint of a run that trained on all pairs of its tokens."""
    p = demo_modulus(model)
    if isinstance(p, Needs):
        return p
    return _joined([(0, _measures(model, p, [1]))], p, [1])
