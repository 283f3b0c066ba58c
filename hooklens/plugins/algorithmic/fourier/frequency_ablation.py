"""Single-frequency ablations: the loss without one frequency's terms in the logits, or in the neurons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.progress_bar import progress
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.fourier.basis import (
    checked_frequencies,
    distinguished,
    keep_single_frequencies,
)
from hooklens.plugins.algorithmic.fourier.demo_task import demo_modulus
from hooklens.plugins.algorithmic.fourier.key_frequencies import find_key_frequencies
from hooklens.plugins.algorithmic.fourier.pair_table import (
    PairTable,
    Task,
    as_table,
    need_neurons,
    pair_prompts,
    run_prompts,
    tabulate,
)
from hooklens.plugins.algorithmic.fourier.progress_measures import excluded_logits
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table


@dataclass(frozen=True, eq=False)
class FrequencyAblation(Result):
    """Loss and accuracy on all pairs after one frequency's terms were removed, and those of the model (`base`).

    `site` is "logits": the terms in cos and sin of w_k (a + b); or "post": the eight terms of frequency k in the
    activations of a layer's neurons at the last position.
    """

    ranked_by = "loss"
    baselines = ("base", "base_accuracy", "chance")
    terms = {
        "key": "whether it is one of the key frequencies",
        "answers": "how many of the p answers this frequency tells apart; all of them if p is prime",
    }

    modulus: int
    site: str
    frequencies: Int[Tensor, "removed"]
    losses: Float[Tensor, "removed"]
    accuracies: Float[Tensor, "removed"]
    keys: list[int]
    base: float
    base_accuracy: float
    chance: float

    def table(self, n: int | None = 12) -> Table:
        """The frequencies whose removal raises the loss most."""
        rows = []
        for i in self.losses.argsort(descending=True, stable=True).tolist():
            k = int(self.frequencies[i])
            values = (float(of[i]) for of in (self.losses, self.accuracies))
            rows.append((k, *values, "yes" if k in self.keys else "no", distinguished(self.modulus, [k])))
        return Table(("frequency", "loss", "accuracy", "key", "answers"), rows).head(n)

    def figure(self) -> Any:
        """The loss without each frequency; a star marks the key ones."""
        from hooklens.viz.figures import bars

        names = [f"{k}*" if k in self.keys else str(k) for k in self.frequencies.tolist()]
        title = f"Loss on all pairs without one frequency in the {_SITES[self.site]} (* key)"
        marks = {"nothing removed": self.base, "ln p": self.chance}
        return bars(self.losses, labels=names, title=title, x_title="removed", y_title="nats", marks=marks)


_SITES = {"logits": "logits", "post": "neurons"}


def ablate_logit_frequencies(
    model: HookedTransformer | PairTable, data: Task | None = None, *, frequencies: Sequence[int] | None = None
) -> FrequencyAblation:
    """How much worse is the model without the (a + b) terms of each single frequency in its logits?

    >>> from hooklens.plugins.algorithmic.fourier.logit_formula import formula_logits
    >>> ablation = ablate_logit_frequencies(tabulate(formula_logits(7, {2: 9.0})))
    >>> ablation.losses.round(decimals=2).tolist(), ablation.keys
    ([0.07, 1.95, 0.07], [2])

    `frequencies` default to all. The model may also be the table of `run_pairs` or `tabulate`.

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", appendix C.1.5
    and figure 15: the excluded loss of each frequency, there on the training pairs, here on all pairs.
    """
    table = as_table(model, data)
    removed = _removed(table, frequencies)
    without = (tabulate(excluded_logits(table.logits, [k])) for k in removed)
    return _measured(table, removed, [(other.loss, other.accuracy) for other in without], site="logits")


def ablate_neuron_frequencies(
    model: HookedTransformer, data: Task, *, layer: int = -1, frequencies: Sequence[int] | None = None
) -> FrequencyAblation:
    """How much worse is the model without the eight terms of each single frequency in its neurons?

    The terms of frequency k are cos and sin of w_k a and of w_k b, and their four products, of every neuron's
    activation over the table of pairs. They are removed through a hook on `post` at the last position.

    >>> from hooklens.testing import tiny_model
    >>> ablate_neuron_frequencies(tiny_model(d_vocab=8), 7).losses.shape
    torch.Size([3])

    Reference: the notebook of Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability",
    which removes single key frequencies from the neurons. Section 4.4 has other ablations: it keeps nothing but cos and
    sin of w_k (a + b) in the neurons, and nothing but the key frequencies' eight terms each in the logits.
    """
    table = as_table(model, data, layer=layer)
    post, removed = need_neurons(table), _removed(table, frequencies)
    prompts = pair_prompts(model, table.modulus)
    measures = []
    with progress("frequencies", len(removed), unit="frequency") as advance:
        for k in removed:
            without = (post - keep_single_frequencies(post, [k])).flatten(0, 1)
            logits = run_prompts(model, prompts, write=(("post", layer), without))[:, : table.modulus]
            other = tabulate(logits.view(table.logits.shape))
            measures.append((other.loss, other.accuracy))
            advance(1)
    return _measured(table, removed, measures, site="post")


def _removed(table: PairTable, frequencies: Sequence[int] | None) -> list[int]:
    return (
        list(range(1, table.modulus // 2 + 1))
        if frequencies is None
        else checked_frequencies(frequencies, table.modulus)
    )


def _measured(
    table: PairTable, removed: list[int], measures: list[tuple[float, float]], *, site: str
) -> FrequencyAblation:
    losses, accuracies = torch.tensor(measures, dtype=torch.float64).T
    return FrequencyAblation(
        modulus=table.modulus,
        site=site,
        frequencies=torch.tensor(removed),
        losses=losses,
        accuracies=accuracies,
        keys=find_key_frequencies(table).keys,
        base=table.loss,
        base_accuracy=table.accuracy,
        chance=table.chance,
    )


def demo(model: HookedTransformer) -> FrequencyAblation | Needs:
    """Every frequency of the last layer's neurons, on the pairs of the model's tokens."""
    p = demo_modulus(model, mlp=True)
    return p if isinstance(p, Needs) else ablate_neuron_frequencies(model, p)
