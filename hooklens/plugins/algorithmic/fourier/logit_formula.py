"""The logits as a sum of cosines, alpha_k cos w_k (a + b - c) over k: fitted, and how much of them it explains."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import real, whole
from hooklens.core.errors import WrongType
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.fourier.basis import checked_frequencies, distinguished, fourier_basis, mean_by_sum
from hooklens.plugins.algorithmic.fourier.demo_task import demo_modulus
from hooklens.plugins.algorithmic.fourier.pair_table import PairTable, Task, as_table, need_logits
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table

Logits = Float[Tensor, "a b answer"]


@dataclass(frozen=True, eq=False)
class LogitFormula(Result):
    """The coefficient of every frequency, and what the formula with the chosen ones explains.

    `explained` is the share of the variance of all p^3 logits around their mean. `explained_centred` is the same after
    the mean over answers is taken from the logits of each pair, which leaves every probability as it is.
    """

    ranked_by = "absolute coefficient"
    terms = {
        "answers": "how many of the p answers this frequency tells apart; all of them if p is prime",
        "similarity": "the cosine of centred logits and cos w (a + b - c)",
        "used": "whether it is one of the frequencies of the formula",
    }

    coefficients: Float[Tensor, "frequency"]
    similarity: Float[Tensor, "frequency"]
    frequencies: Int[Tensor, "used"]
    explained: float
    explained_centred: float
    modulus: int

    def logits(self) -> Logits:
        """The logits that the formula gives, with the chosen frequencies."""
        return formula_logits(self.modulus, {k: float(self.coefficients[k - 1]) for k in self.frequencies.tolist()})

    def table(self, n: int | None = 12) -> Table:
        """The frequencies with the largest coefficients."""
        used = set(self.frequencies.tolist())
        rows = []
        for i in self.coefficients.abs().argsort(descending=True, stable=True).tolist():
            values = (float(of[i]) for of in (self.coefficients, self.similarity))
            rows.append((i + 1, *values, "yes" if i + 1 in used else "no", distinguished(self.modulus, [i + 1])))
        return Table(("frequency", "coefficient", "similarity", "used", "answers"), rows).head(n)

    def figure(self) -> Any:
        """The coefficient of every frequency."""
        from hooklens.viz.figures import bars

        n = len(self.frequencies)
        title = f"Coefficients of cos w (a + b - c) in the logits; {n} of them explain {self.explained_centred:.1%}"
        labels = range(1, self.modulus // 2 + 1)
        return bars(self.coefficients, labels=labels, title=title, x_title="frequency", y_title="coefficient")


def formula_logits(p: int, coefficients: Mapping[int, float]) -> Logits:
    """The logits sum_k alpha_k cos(2 pi k (a + b - c) / p), from the coefficient of each frequency.

    >>> formula_logits(5, {1: 2.0})[3, 4, 2].item()         # 3 + 4 = 2 modulo 5
    2.0
    """
    whole("p", p, 2)
    if not isinstance(coefficients, Mapping):
        raise WrongType(f"coefficients are a dict of each frequency's, such as {{2: 9.0}}; got {coefficients!r:.60}")
    frequencies = checked_frequencies(list(coefficients), p)
    alpha = {int(k): real("coefficients", v.item() if isinstance(v, Tensor) else v) for k, v in coefficients.items()}
    n = torch.arange(p)
    waves = [alpha[k] * torch.cos(2 * math.pi / p * (k * n % p).double()) for k in frequencies]
    offset = (n[:, None, None] + n[:, None] - n) % p
    return torch.stack(waves).sum(0)[offset]


def mean_by_offset(logits: Logits) -> Float[Tensor, "offset"]:
    """The mean of the logits over all (a, b, c) with each a + b - c: the part of them that formulas can be.

    >>> mean_by_offset(formula_logits(5, {1: 2.0}))[0].item()
    2.0
    """
    p = need_logits(logits)
    by_sum = mean_by_sum(logits.double())
    n = torch.arange(p, device=logits.device)
    return by_sum[n, (n - n[:, None]) % p].mean(1)  # [offset, s]: the answer is s - offset


def formula_coefficients(logits: Logits) -> Float[Tensor, "frequency"]:
    """The least-squares alpha_k of every frequency; the cosines are orthogonal, so that none depends on the others.

    >>> formula_coefficients(formula_logits(7, {1: 2.0, 3: 0.5})).round(decimals=6).tolist()
    [2.0, 0.0, 0.5]
    """
    projected, size = _cosines(logits)
    return projected / size


def logit_similarity(logits: Logits) -> Float[Tensor, "frequency"]:
    """The cosine between the logits, centred for each pair, and cos w_k (a + b - c), for every frequency.

    >>> logit_similarity(formula_logits(7, {1: 3.0, 2: 4.0})).round(decimals=6).tolist()
    [0.6, 0.8, 0.0]

    Reference: Chughtai et al. (2023), "A Toy Model of Universality", section 5.1: the character of the representation
    with frequency k is 2 cos w_k (a + b - c).
    """
    projected, size = _cosines(logits)
    centred = logits.double() - logits.double().mean(-1, keepdim=True)
    rounding = torch.finfo(torch.float64).eps * len(logits) * float(logits.abs().max())
    if float(centred.abs().max()) <= rounding:  # the logits of each pair are equal: a direction of rounding alone
        return torch.zeros_like(projected)
    return len(logits) * projected / (size.sqrt() * centred.norm())  # each offset occurs p^2 times


def fit_logit_formula(
    model: HookedTransformer | PairTable, data: Task | None = None, *, frequencies: Sequence[int] | None = None
) -> LogitFormula:
    """How well does sum_k alpha_k cos w_k (a + b - c) describe the logits, and with which coefficients?

    Without `frequencies` all are fitted. `model` may also be the table of `run_pairs` or `tabulate`.

    >>> from hooklens.plugins.algorithmic.fourier.pair_table import tabulate
    >>> formula = fit_logit_formula(tabulate(formula_logits(7, {1: 2.0, 3: 0.5})), frequencies=[1])
    >>> round(formula.explained, 6)                         # 4 / (4 + 1/4)
    0.941176

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", section 4.2: the
    key frequencies' cosines, with coefficients by least squares, explain 95 % of the variance of the logits.
    """
    table = as_table(model, data, layer=None)
    p, coefficients = table.modulus, formula_coefficients(table.logits)
    used = list(range(1, p // 2 + 1)) if frequencies is None else checked_frequencies(frequencies, p)
    fitted = formula_logits(p, {k: float(coefficients[k - 1]) for k in used})
    centred = table.logits - table.logits.mean(-1, keepdim=True)
    return LogitFormula(
        coefficients=coefficients,
        similarity=logit_similarity(table.logits),
        frequencies=torch.tensor(used),
        explained=_explained(table.logits - table.logits.mean(), fitted),
        explained_centred=_explained(centred, fitted),
        modulus=p,
    )


def _explained(logits: Logits, fitted: Logits) -> float:
    return float(1 - (logits - fitted).square().sum() / logits.square().sum())


def _cosines(logits: Logits) -> tuple[Float[Tensor, "frequency"], Float[Tensor, "frequency"]]:
    """The products of the mean logit of each offset with cos w_k of it, and the products of these cosines."""
    p = len(logits)
    basis = fourier_basis(p).to(logits.device)[1::2]
    cosines = basis / basis[:, :1]  # 1 at offset 0
    return cosines @ mean_by_offset(logits), cosines.square().sum(1)


def demo(model: HookedTransformer) -> LogitFormula | Needs:
    """All frequencies, on the pairs of the model's tokens."""
    p = demo_modulus(model)
    return p if isinstance(p, Needs) else fit_logit_formula(model, p)
