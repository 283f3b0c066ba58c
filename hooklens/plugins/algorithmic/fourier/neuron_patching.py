"""Activation patching of MLP neurons between two sums, added up by the frequency of the neurons."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.errors import InputError, WrongType
from hooklens.core.names import site as site_of
from hooklens.metrics import logit_diff
from hooklens.model.ids import as_ids
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.fourier.basis import distinguished
from hooklens.plugins.algorithmic.fourier.demo_task import demo_modulus
from hooklens.plugins.algorithmic.fourier.neuron_frequencies import (
    NeuronFrequencies,
    classify_neurons,
    explain_by_frequency,
)
from hooklens.plugins.algorithmic.fourier.pair_table import (
    PairTable,
    Task,
    modulus_of,
    need_neurons,
    pair_prompts,
    run_pairs,
)
from hooklens.plugins.patching.activation import PatchSweep, patch
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table

_COMPARED = 16  # neurons that are compared with the model's own
_SAME = 0.01  # of a neuron's variance: far above rounding

Pairs = Int[Tensor, "prompt 2"]


@dataclass(frozen=True, eq=False)
class NeuronPatching(Result):
    """The effect of every neuron of a layer, patched alone, and which frequency it belongs to.

    `effects` are changes of the metric, the clean sum's logit above the corrupted sum's, when the clean activation is
    written into the corrupted run; means over prompts. `clean` and `corrupted` are the metric in the two runs. If
    logits are linear in the neurons, effects add up; what is left of the gap did not go through these neurons.
    """

    ranked_by = "share of the gap"
    baselines = ("clean", "corrupted")
    terms = {
        "neurons": "those that single-frequency terms explain above the threshold",
        "effect": "the sum of the changes of the metric when each neuron is patched alone",
        "of the gap": "that sum as a share of the difference between the clean and the corrupted metric",
        "answers": "how many of the p answers waves of this frequency tell apart; all of them if p is prime",
    }

    modulus: int
    effects: Float[Tensor, "neuron"]
    frequency: Int[Tensor, "neuron"]
    clean: float
    corrupted: float
    largest_error: float

    @property
    def gap(self) -> float:
        """The metric in the clean run minus that in the corrupted one."""
        return self.clean - self.corrupted

    def by_frequency(self) -> Float[Tensor, "frequency"]:
        """The sum of effects over the neurons of each frequency: first those that have none, then 1 to p // 2."""
        total = torch.zeros(self.modulus // 2 + 1, dtype=self.effects.dtype)
        return total.index_add(0, self.frequency, self.effects)

    @property
    def total(self) -> float:
        """The sum of the effects of all neurons."""
        return float(self.effects.sum())

    def table(self, n: int | None = None) -> Table:
        """One row for every frequency that has neurons, and one for the neurons that have none, the largest first."""
        effects, counts = self.by_frequency(), torch.bincount(self.frequency, minlength=self.modulus // 2 + 1)
        rows = []
        for k in sorted(counts.nonzero()[:, 0].tolist(), key=lambda k: -float(effects[k]) / self.gap):
            effect, name = float(effects[k]), str(k) if k else "none"
            rows.append(
                (name, int(counts[k]), effect, effect / self.gap, distinguished(self.modulus, [k]) if k else None)
            )
        return Table(("frequency", "neurons", "effect", "of the gap", "answers"), rows).head(n)

    def figure(self) -> Any:
        """The share of the gap that the neurons of each frequency restore."""
        from hooklens.viz.figures import bars

        rows = self.table(None).rows
        title = f"Neurons patched one at a time, by frequency: {self.total / self.gap:.1%} of the gap in all"
        shares = torch.tensor([row[3] for row in rows], dtype=torch.float64)
        return bars(shares, labels=[row[0] for row in rows], title=title, x_title="frequency", y_title="of the gap")


def patch_neurons(
    model: HookedTransformer,
    data: Task,
    clean: Pairs | list,
    corrupted: Pairs | list,
    *,
    layer: int = -1,
    neurons: NeuronFrequencies | None = None,
) -> NeuronPatching:
    """The neurons of which frequencies carry the answer from a clean to a corrupted pair?

    `clean` and `corrupted` are pairs (a, b), equally many. Every neuron of the layer is patched alone, through
    `hl.patch(..., site="post", by="layer x neuron")`, and `largest_error` is the largest difference to the plain loop
    in the entries that were run again. `neurons` says which frequency each has, by default from all pairs.

    >>> from hooklens.testing import tiny_model
    >>> patching = patch_neurons(tiny_model(d_vocab=8), 7, [[1, 2]], [[1, 4]])
    >>> patching.effects.shape, patching.by_frequency().shape
    (torch.Size([32]), torch.Size([4]))

    Reference: Meng et al. (2022), "Locating and Editing Factual Associations in GPT", section 2, for the patching; the
    sums by frequency are ours.
    """
    p, (clean, corrupted) = modulus_of(data), _checked(clean, corrupted, modulus_of(data))
    neurons = _own_neurons(run_pairs(model, data, layer=layer), neurons)
    answers, others = (pairs.sum(1) % p for pairs in (clean, corrupted))
    prompts = pair_prompts(model, p).view(p, p, -1)
    runs = [prompts[pairs[:, 0], pairs[:, 1]] for pairs in (clean, corrupted)]
    metric = logit_diff(model, answer=answers, wrong_answer=others)
    sweep: PatchSweep = patch(model, runs[0], runs[1], metric, site=site_of("post", layer), by="layer x neuron")
    return NeuronPatching(
        modulus=p,
        effects=sweep.effect[0].double().cpu(),
        frequency=torch.where(neurons.is_explained, neurons.frequency, 0),
        clean=float(sweep.clean),
        corrupted=float(sweep.corrupted),
        largest_error=float(sweep.largest_error),
    )


def _own_neurons(table: PairTable, neurons: NeuronFrequencies | None) -> NeuronFrequencies:
    """The neurons of the table: those that were classified before, after a look at a few, or all of them anew."""
    if neurons is None:
        return classify_neurons(table)
    if not isinstance(neurons, NeuronFrequencies):
        raise WrongType(f"neurons are those of classify_neurons(model, data), got {neurons!r:.60}; leave them out")
    post, n = need_neurons(table), len(neurons.spectrum)
    if (neurons.modulus, n) != (table.modulus, post.shape[-1]):
        raise InputError(
            f"{n} neurons were given, classified modulo {neurons.modulus}, and this layer has {post.shape[-1]}, for "
            f"p = {table.modulus}; leave neurons out"
        )
    some = torch.arange(0, n, max(1, n // _COMPARED))
    if float((explain_by_frequency(post[..., some]) - neurons.spectrum[some]).abs().max()) > _SAME:
        raise InputError("the neurons given are not those of this layer: their spectra differ; leave neurons out")
    return neurons


def random_pairs(p: int, n: int, *, seed: int = 0) -> tuple[Pairs, Pairs]:
    """`n` clean and corrupted pairs that differ in b, and so in their sums.

    >>> clean, corrupted = random_pairs(7, 3)
    >>> bool((clean[:, 0] == corrupted[:, 0]).all()), bool((clean[:, 1] != corrupted[:, 1]).all())
    (True, True)
    """
    generator = seeded(seed)
    clean = torch.randint(whole("p", p, 2), (whole("n", n, 1), 2), generator=generator)
    shift = torch.randint(1, p, (n,), generator=generator)
    return clean, torch.stack([clean[:, 0], (clean[:, 1] + shift) % p], 1)


def _checked(clean: Any, corrupted: Any, p: int) -> tuple[Pairs, Pairs]:
    pairs = [as_ids(given, "pairs are numbers [prompt 2]").cpu() for given in (clean, corrupted)]
    shapes = [list(of.shape) for of in pairs]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1] != 2 or not shapes[0][0]:
        raise InputError(
            f"clean and corrupted are equally many pairs [prompt 2], got shapes {shapes[0]} and {shapes[1]}"
        )
    if not all(int(of.min()) >= 0 and int(of.max()) < p for of in pairs):
        raise InputError(
            f"pairs hold numbers from 0 to {p - 1}, got {int(min(of.min() for of in pairs))} to "
            f"{int(max(of.max() for of in pairs))}"
        )
    same = (pairs[0].sum(1) - pairs[1].sum(1)) % p == 0
    if bool(same.any()):
        at = int(same.nonzero()[0])
        raise InputError(
            f"clean and corrupted pairs need different sums, and those of prompt {at} are equal modulo {p}: "
            f"{pairs[0][at].tolist()} and {pairs[1][at].tolist()}"
        )
    return pairs[0], pairs[1]


def demo(model: HookedTransformer) -> NeuronPatching | Needs:
    """One pair of prompts, at the neurons of the last layer."""
    p = demo_modulus(model, mlp=True)
    return p if isinstance(p, Needs) else patch_neurons(model, p, [[0, 1]], [[0, 2]])
