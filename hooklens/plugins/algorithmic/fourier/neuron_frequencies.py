"""Neurons by frequency: how much of each neuron's variance over all pairs terms of a single frequency explain."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import real
from hooklens.core.errors import ArgumentError
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.fourier.basis import (
    distinguished,
    frequency_power,
    frequency_power_2d,
    mean_by_sum,
    need_finite,
    need_pairs,
)
from hooklens.plugins.algorithmic.fourier.demo_task import demo_modulus
from hooklens.plugins.algorithmic.fourier.pair_table import PairTable, Task, as_table, need_neurons
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table

THRESHOLD = 0.85  # of a neuron's variance: Nanda et al. (2023), section 4.3, count the neurons above it


@dataclass(frozen=True, eq=False)
class NeuronFrequencies(Result):
    """The share of every neuron's variance in terms of one frequency, and in cos and sin of that frequency of a + b.

    A neuron belongs to the frequency whose eight terms (cos and sin of w a and of w b, and their four products) explain
    most of its variance over all pairs. It counts as explained above `threshold`. A neuron that is constant belongs to
    no frequency.
    """

    ranked_by = "neurons above the threshold"
    terms = {
        "neurons": "those of which single-frequency terms explain more than the threshold",
        "closest": "all neurons whose most explaining frequency this is",
        "explained": "the mean share of variance in single-frequency terms, over the closest neurons",
        "of a + b": "the mean share of variance in cos and sin of w (a + b), over the closest neurons",
        "answers": "how many of the p answers waves of this frequency tell apart; all of them if p is prime",
    }

    modulus: int
    spectrum: Float[Tensor, "neuron frequency"]
    sum_spectrum: Float[Tensor, "neuron frequency"]
    threshold: float

    @property
    def frequency(self) -> Int[Tensor, "neuron"]:
        """The frequency that explains most of each neuron; 0 for a constant one."""
        return torch.where(self.explained > 0, self.spectrum.argmax(1) + 1, 0)

    @property
    def explained(self) -> Float[Tensor, "neuron"]:
        """The share of variance that this frequency's terms explain."""
        return self.spectrum.amax(1)

    @property
    def is_explained(self) -> Bool[Tensor, "neuron"]:
        """Whether that is above the threshold."""
        return self.explained > self.threshold

    @property
    def share_explained(self) -> float:
        """The share of all neurons above the threshold."""
        return float(self.is_explained.double().mean())

    @property
    def n_explained(self) -> int:
        """The number of neurons above the threshold."""
        return int(self.is_explained.sum())

    def counts(self) -> Int[Tensor, "frequency"]:
        """The number of neurons above the threshold, for frequencies 1 to p // 2."""
        return torch.bincount(self.frequency[self.is_explained], minlength=self.modulus // 2 + 1)[1:]

    @property
    def keys(self) -> list[int]:
        """The frequencies with at least one neuron above the threshold."""
        return (self.counts().nonzero()[:, 0] + 1).tolist()

    def table(self, n: int | None = None) -> Table:
        """One row for every frequency that is closest to some neuron, the one with most neurons first."""
        counts, closest = self.counts(), torch.bincount(self.frequency, minlength=self.modulus // 2 + 1)[1:]
        present = [i for i in range(len(counts)) if closest[i]]
        rows = []
        for i in sorted(present, key=lambda i: (-int(counts[i]), -int(closest[i]))):
            own = self.frequency == i + 1
            means = (float(of[own, i].mean()) for of in (self.spectrum, self.sum_spectrum))
            rows.append((i + 1, int(counts[i]), int(closest[i]), *means, distinguished(self.modulus, [i + 1])))
        return Table(("frequency", "neurons", "closest", "explained", "of a + b", "answers"), rows).head(n)

    def figure(self) -> Any:
        """The number of explained neurons by frequency, above the distribution of the variance explained."""
        from hooklens.viz.figures import bars
        from hooklens.viz.histograms import histogram
        from hooklens.viz.small_multiples import panels
        from hooklens.viz.theme import NEUTRAL

        n = len(self.explained)
        title = f"Neurons by frequency: {self.n_explained} of {n} are explained above {self.threshold:.0%}"
        edges = torch.linspace(0, 1, 21)
        counts = torch.histogram(self.explained.double().clamp(0, 1), edges.double()).hist
        by_frequency = bars(
            self.counts(), labels=range(1, self.modulus // 2 + 1), title=title, x_title="frequency", y_title="neurons"
        )
        shares = histogram(
            counts, edges, title="Variance that single-frequency terms explain", x_title="share", y_title="neurons"
        )
        line = {"color": NEUTRAL, "width": 1.2, "dash": "dash"}
        shares.add_vline(x=self.threshold, line=line, annotation={"text": "threshold", "font": {"size": 11}})
        return panels([by_frequency, shares])


def explain_by_frequency(post: Float[Tensor, "a b neuron"]) -> Float[Tensor, "neuron frequency"]:
    """The share of each neuron's variance over all pairs in the eight terms of each frequency 1 to p // 2.

    >>> from hooklens.plugins.algorithmic.fourier.basis import sums
    >>> wave = torch.cos(2 * torch.pi / 7 * 2 * sums(7).double())
    >>> explain_by_frequency(5 + wave[:, :, None]).round(decimals=6).tolist()
    [[0.0, 1.0, 0.0]]

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", section 4.3 and
    the authors' notebook: activations are centred, and compared with constant, linear and quadratic terms.
    """
    centred = _centred(post)
    return _shares(frequency_power_2d(centred), post.double()).T


def explain_by_sum(post: Float[Tensor, "a b neuron"]) -> Float[Tensor, "neuron frequency"]:
    """The share of each neuron's variance over all pairs in cos w_k (a + b) and sin w_k (a + b)."""
    centred = _centred(post)
    return _shares(frequency_power(mean_by_sum(centred)) * len(post), post.double()).T


def _centred(post: Float[Tensor, "a b neuron"]) -> Float[Tensor, "a b neuron"]:
    need_pairs("post", post, "[a b neuron]")
    need_finite("activations", post)
    wide = post.double()
    return wide - wide.mean((0, 1))


def _shares(power: Float[Tensor, "frequency neuron"], post: Float[Tensor, "a b neuron"]) -> Tensor:
    """Shares of the sum of squares around the mean; 0 for a neuron that varies by no more than rounding."""
    squares = (post - post.mean((0, 1))).square().sum((0, 1))
    rounding = (torch.finfo(post.dtype).eps * len(post) * post.abs().amax((0, 1))).square()
    return torch.where(squares > rounding, power / squares, torch.zeros_like(power))


def classify_neurons(
    model: HookedTransformer | PairTable, data: Task | None = None, *, layer: int = -1, threshold: float = THRESHOLD
) -> NeuronFrequencies:
    """Which frequency does each neuron compute with, and how much of its variance does that explain?

    `model` may also be the table of `run_pairs` or `tabulate`, which is then not run again.

    >>> from hooklens.testing import tiny_model
    >>> neurons = classify_neurons(tiny_model(d_vocab=14), 13)
    >>> neurons.spectrum.shape, neurons.keys              # an untrained model
    (torch.Size([32, 6]), [])

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", section 4.3.
    """
    if real("threshold", threshold, 0.0) >= 1:
        raise ArgumentError("{threshold} is a share of a neuron's variance, at least 0 and below 1; got {0}", threshold)
    post = need_neurons(as_table(model, data, layer=layer))
    return NeuronFrequencies(
        modulus=len(post),
        spectrum=explain_by_frequency(post),
        sum_spectrum=explain_by_sum(post),
        threshold=float(threshold),
    )


def demo(model: HookedTransformer) -> NeuronFrequencies | Needs:
    """The neurons of the last layer, on all pairs of the model's tokens."""
    p = demo_modulus(model, mlp=True)
    return p if isinstance(p, Needs) else classify_neurons(model, p)
