"""Key frequencies: which ones a model computes with, by several rules, published ones and ours, each under its name."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.errors import did_you_mean
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.fourier.basis import distinguished, frequency_power
from hooklens.plugins.algorithmic.fourier.demo_task import demo_modulus
from hooklens.plugins.algorithmic.fourier.logit_formula import Logits, logit_similarity
from hooklens.plugins.algorithmic.fourier.neuron_frequencies import classify_neurons
from hooklens.plugins.algorithmic.fourier.pair_table import PairTable, Task, modulus_of, own_table
from hooklens.plugins.algorithmic.fourier.weight_spectra import (
    embedding_rows_of,
    measure_fourier_spectrum,
    norms_by_frequency,
)
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table

SIMILARITY = (
    0.005  # a representation is key above it: `determine_key_reps` in the authors' code, Chughtai et al. (2023)
)
SPARSITY = 0.5  # eta of the Fourier Frequency Sparsity, Furuta et al. (2024)
CIRCULARITY = 0.995  # of the first four principal components, Zhong et al. (2023)
GAP = 2.0  # ours: the smallest ratio of two neighbouring norms that separates key frequencies from others

#: The rules, in the order in which `keys` prefers them.
RULES = {
    "neurons": (
        "ours, after Nanda et al. (2023), section 4.3, which counts the neurons that the eight terms of one frequency "
        "explain above 85 % of the variance: the frequencies with at least one such neuron (score: their number). "
        "The paper reads key frequencies off W_E (section 4.1) and W_L (appendix C.2). The authors' code lists the "
        "frequency that explains most of each neuron, also below 85 %, among 1 to p // 2 - 1"
    ),
    "logit similarity": (
        "Chughtai et al. (2023), section 5.1: frequencies for which the cosine between centred logits and "
        "cos w_k (a + b - c) is above 0.005, as in the authors' code"
    ),
    "sparsity of W_E": (
        "as a key rule: ours. The Fourier Frequency Sparsity of Furuta et al. (2024), equation 5 (Fourier Frequency "
        "Density in the later version), counts the components that are above eta = 0.5 times the largest norm, that of "
        "all cosines for cosines and that of all sines for sines; here the frequencies with such a component. Their "
        "components sum over the numbers 1 to p // 2, ours over all p"
    ),
    "sparsity of W_L": "the same of the neuron-to-logit map",
    "circles": (
        "as a key rule: ours. The circularity of Zhong et al. (2023), definition B.1, of a principal component v of "
        "the embedding is max_k 2 |sum_j v_j exp(2 pi i j k / p)|^2 / (p sum_j v_j^2). They keep models with a mean "
        "of at least 99.5 % over the first four components (here fewer if the rank is below four) as circular ones. "
        "The key frequencies are those of the maxima (score: the largest of a component with this frequency)"
    ),
    "gap in W_E": (
        "a rule of ours for what Nanda et al. (2023) read off figure 3: the frequencies before the largest ratio of "
        "two neighbouring norms in decreasing order, if that is at least 2"
    ),
    "gap in W_L": (
        "the same of the neuron-to-logit map, of which Nanda et al. (2023), appendix C.2, take the frequencies with "
        "nontrivial coefficients for restricted and excluded loss, without a threshold"
    ),
}


@dataclass(frozen=True, eq=False)
class KeyFrequencies(Result):
    """The key frequencies by each rule that could be applied, and the score of every frequency that the rule reads.

    `sources` says for each rule where it is published, or after what it is ours. Rules that need neurons or weights
    are absent where these are.
    """

    baselines = ("answers",)

    modulus: int
    by_rule: dict[str, list[int]]
    scores: dict[str, Float[Tensor, "frequency"]]
    sources: dict[str, str]

    @property
    def keys(self) -> list[int]:
        """Those by the neuron rule, or by logit similarity in a model without neurons."""
        return next(iter(self.by_rule.values()))

    def headline(self) -> str:
        """The key frequencies first."""
        return f"keys {' '.join(map(str, self.keys)) or 'none'}, {super().headline()}"

    @property
    def answers(self) -> int:
        """How many of the p answers the key frequencies tell apart; fewer than p only for composite p."""
        return distinguished(self.modulus, self.keys)

    def by(self, rule: str) -> list[int]:
        """The key frequencies by one rule."""
        if rule not in self.by_rule:
            raise did_you_mean("rule for key frequencies", rule, self.by_rule)
        return self.by_rule[rule]

    def table(self, n: int | None = None) -> Table:
        """The frequencies that any rule names, with the score of each rule, an empty cell where it does not name it."""
        named = sorted({k for keys in self.by_rule.values() for k in keys})
        votes = {k: sum(k in keys for keys in self.by_rule.values()) for k in named}
        rows = []
        for k in sorted(named, key=lambda k: (-votes[k], k)):
            cells = [self._score(rule, k) if k in keys else None for rule, keys in self.by_rule.items()]
            rows.append((k, votes[k], *cells))
        return Table(("frequency", "rules", *self.by_rule), rows).head(n)

    def _score(self, rule: str, k: int) -> float | int:
        """The score of a frequency; the neuron rule counts."""
        score = float(self.scores[rule][k - 1])
        return int(score) if rule == "neurons" else score

    def figure(self) -> Any:
        """The score of every frequency as a share of the rule's largest; the key ones are marked."""
        from hooklens.viz.figures import heatmap

        shares = torch.stack([score / score.abs().max().clamp_min(1e-300) for score in self.scores.values()])
        marks = [["x" if k + 1 in keys else "·" for k in range(self.modulus // 2)] for keys in self.by_rule.values()]
        title = f"Key frequencies modulo {self.modulus}: " + (
            ", ".join(map(str, self.keys)) or "none by the first rule"
        )
        return heatmap(
            shares,
            x=range(1, self.modulus // 2 + 1),
            y=list(self.scores),
            title=title,
            x_title="frequency",
            colourbar="share of largest",
            cells=marks,
            diverging=False,
        )


def find_key_frequencies(
    model: HookedTransformer | PairTable, data: Task | None = None, *, layer: int = -1, table: PairTable | None = None
) -> KeyFrequencies:
    """Which frequencies does the model compute with, by each rule?

    `model` may also be the table of `run_pairs` or `tabulate`; rules that read weights are then left out. `table`
    saves the run over all pairs where it is known already; one of another model is refused.

    >>> from hooklens.plugins.algorithmic.fourier.logit_formula import formula_logits
    >>> from hooklens.plugins.algorithmic.fourier.pair_table import tabulate
    >>> found = find_key_frequencies(tabulate(formula_logits(13, {2: 9.0, 5: 7.0})))
    >>> found.by("logit similarity")
    [2, 5]

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability"; Chughtai et al.
    (2023), "A Toy Model of Universality"; Zhong et al. (2023), "The Clock and the Pizza"; Furuta et al. (2024),
    "Interpreting Grokked Transformers in Complex Modular Arithmetic" (later "Towards Empirical Interpretation of
    Internal Circuits and Properties in Grokked Transformers on Modular Polynomials"): see `sources`. Gromov (2023),
    "Grokking modular arithmetic", gives every neuron a frequency of its own and names no key ones.
    """
    table = own_table(model, data, table, layer=layer)
    rules = {}
    if table.post is not None:
        neurons = classify_neurons(table)
        rules["neurons"] = neurons.keys, neurons.counts().double()
    rules["logit similarity"] = by_logit_similarity(table.logits)
    if not isinstance(model, PairTable):
        spectra = measure_fourier_spectrum(model, table.modulus, layer=layer).spectra
        rules |= {f"sparsity of {name}": by_sparsity(norms) for name, norms in spectra.items()}
        rules["circles"] = by_circularity(embedding_rows_of(model, table.modulus))
        rules |= {f"gap in {name}": by_gap(norms) for name, norms in spectra.items()}
    return KeyFrequencies(
        modulus=table.modulus,
        by_rule={rule: keys for rule, (keys, _) in rules.items()},
        scores={rule: scores for rule, (_, scores) in rules.items()},
        sources={rule: RULES[rule] for rule in rules},
    )


Rule = tuple[list[int], Float[Tensor, "frequency"]]  # the key frequencies, and the score of every frequency


def by_logit_similarity(logits: Logits, *, above: float = SIMILARITY) -> Rule:
    """Chughtai et al. (2023): the cosine between centred logits and the character is above 0.005."""
    similarity = logit_similarity(logits)
    return _where(similarity > above), similarity


def by_sparsity(norms: Float[Tensor, "component"], *, eta: float = SPARSITY) -> Rule:
    """After Furuta et al. (2024): the cosine has more than `eta` of the largest cosine's norm, or the sine of a sine's.

    >>> by_sparsity(torch.tensor([7.0, 3.0, 1.0, 0.1, 1.2, 0.2, 0.3]))[0]         # 1.2 is the largest sine
    [1, 2]
    """
    waves = torch.nn.functional.pad(norms[1:], (0, (len(norms) - 1) % 2)).view(-1, 2)  # [frequency, cosine and sine]
    largest = (waves / waves.amax(0).clamp_min(torch.finfo(norms.dtype).tiny)).amax(1)
    return _where(largest > eta), largest


def by_circularity(rows: Float[Tensor, "p d_model"], *, least: float = CIRCULARITY) -> Rule:
    """After Zhong et al. (2023): the frequencies of the first four principal components, if they are circular."""
    p = len(rows)
    scores = torch.zeros(p // 2, dtype=torch.float64)
    left, singular, _ = torch.linalg.svd(rows.double() - rows.double().mean(0), full_matrices=False)
    components = left[:, :4][:, singular[:4] > singular[0] * 1e-9]
    circularity, at = frequency_power(components).max(0)  # columns of `left` have length 1
    for k, value in zip(at.tolist(), circularity.tolist(), strict=True):
        scores[k] = max(float(scores[k]), value)
    is_circular = len(circularity) > 0 and float(circularity.mean()) >= least
    return _where(scores > 0) if is_circular else [], scores


def by_gap(norms: Float[Tensor, "component"], *, least: float = GAP) -> Rule:
    """Ours: the frequencies before the largest ratio of two neighbouring norms in decreasing order.

    >>> by_gap(torch.tensor([7.0, 3.0, 4.0, 0.0, 0.1, 4.0, 3.0, 0.1, 0.2]))[0]
    [1, 3]
    """
    by_frequency = norms_by_frequency(norms)
    order = by_frequency.argsort(descending=True)
    ordered = by_frequency[order].clamp_min(float(by_frequency.max()) * 1e-12)
    ratios = ordered[:-1] / ordered[1:]
    if not len(ratios) or float(ratios.max()) < least:
        return [], by_frequency
    return sorted((order[: int(ratios.argmax()) + 1] + 1).tolist()), by_frequency


def _where(is_key: Tensor) -> list[int]:
    return (is_key.nonzero()[:, 0] + 1).tolist()


def demo(model: HookedTransformer) -> KeyFrequencies | Needs:
    """Every rule, on the pairs of the model's tokens."""
    p = demo_modulus(model)
    return p if isinstance(p, Needs) else find_key_frequencies(model, modulus_of(p))
