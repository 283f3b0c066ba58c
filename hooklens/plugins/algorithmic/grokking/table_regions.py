"""Does a model answer pairs that it has not seen, and everywhere in the table?"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import real, whole
from hooklens.core.errors import ArgumentError, InputError, WrongType
from hooklens.data.modular import Modular, modular_arithmetic
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.plugins.algorithmic.fourier.pair_table import run_prompts
from hooklens.plugins.weights.needs import Needs, lacking
from hooklens.results.result import Result, Table

_EDGE = 0.1  # of the numbers at each end: the corners are pairs of two of them
_HALVINGS = 60
_COLOURS = ("#d9701e", "#6aa3d2", "#d8dee6")  # of pairs that are unseen and wrong, unseen and correct, trained
_LARGEST = 199  # p of a demo

Pairs = Bool[Tensor, "a b"]


@dataclass(frozen=True, eq=False)
class TableRegions(Result):
    """The accuracy on unseen pairs in regions of the table, and which cells were trained on and answered correctly.

    Every unseen pair of a region is tested, so that the accuracies of this model have no sampling error. The intervals
    (Clopper and Pearson, 1934) are those of a share seen in n independent pairs. Pairs of one model are not
    independent: they share rows and columns. Several seeds say more.
    """

    terms = {
        "region": "a part of the table; only pairs that were not trained on are counted",
        "n": "how many pairs",
        "accuracy": "the share of them that the model answers correctly",
        "95% low": "the low end of the exact binomial interval, as if pairs were independent",
        "95% high": "its high end",
    }

    regions: list[str]
    n: Int[Tensor, "region"]
    n_correct: Int[Tensor, "region"]
    low: Float[Tensor, "region"]
    high: Float[Tensor, "region"]
    trained: Pairs
    correct: Pairs

    @property
    def accuracy(self) -> Float[Tensor, "region"]:
        """The share of correct answers; NaN in a region without an unseen pair."""
        return self.n_correct.double() / self.n

    @property
    def weakest(self) -> str | None:
        """The region with the lowest accuracy, of those with at least one pair; None if all have the same."""
        if float(self.accuracy[0]) in (0.0, 1.0):
            return None
        return self.regions[int(self.accuracy.nan_to_num(2.0)[1:].argmin()) + 1]

    @property
    def statement(self) -> str:
        """What the accuracies say."""
        seen = f"{int(self.n_correct[0]):,} of {int(self.n[0]):,} unseen pairs are answered correctly"
        if self.weakest is None:
            return f"{seen}, in every region of the table."
        at = self.regions.index(self.weakest)
        return (
            f"{seen} ({self.accuracy[0]:.2%}); the weakest region is {self.weakest!r} with {int(self.n_correct[at]):,} "
            f"of {int(self.n[at]):,} (95 % {self.low[at]:.2%} to {self.high[at]:.2%}, pairs taken as independent)."
        )

    def table(self, n: int | None = None) -> Table:
        """One row per region."""
        values = [column.tolist() for column in (self.n, self.accuracy, self.low, self.high)]
        rows = list(zip(self.regions, *values, strict=True))
        return Table(("region", "n", "accuracy", "95% low", "95% high"), rows).head(n)

    def figure(self) -> Any:
        """The table: which unseen pairs are answered wrongly, which correctly, and which were trained on."""
        from hooklens.viz.figures import heatmap

        cells = torch.where(self.trained, 2.0, self.correct.double())
        drawn = heatmap(cells, diverging=False, title="The table of pairs", x_title="b", y_title="a")
        steps = [(i / 3, colour) for i, colour in enumerate(_COLOURS)]
        scale = [(at + end, colour) for at, colour in steps for end in (0, 1 / 3)]
        bar = {"tickvals": [0, 1, 2], "ticktext": ["unseen, wrong", "unseen, correct", "trained"]}
        return drawn.update_traces(colorscale=scale, zmin=-0.5, zmax=2.5, colorbar=bar)


def measure_regions(model: HookedTransformer, data: Modular) -> TableRegions:
    """How many of the pairs that a model was not trained on does it answer, by region of the table?

    >>> from hooklens.testing import tiny_model
    >>> regions = measure_regions(tiny_model(d_vocab=8), modular_arithmetic(p=7, fraction=0.4))
    >>> regions.regions[:3], int(regions.n[0])
    (['all unseen pairs', 'partner (b, a) trained', 'partner (b, a) not trained'], 30)
    """
    check_table(model, data)
    correct = correct_pairs(model, data)
    trained = torch.zeros_like(correct)
    trained[tuple(data.pairs[0].T)] = True
    unseen = ~trained
    if not bool(unseen.any()):
        raise InputError(f"all {data.p**2} pairs were trained on, so that none is unseen; give a smaller fraction")
    named = dict(_regions(trained, data))
    n = torch.stack([(unseen & region).sum() for region in named.values()])
    n_correct = torch.stack([(unseen & region & correct).sum() for region in named.values()])
    ends = [binomial_interval(int(k), int(m)) for k, m in zip(n_correct, n, strict=True)]
    return TableRegions(
        regions=list(named),
        n=n,
        n_correct=n_correct,
        low=torch.tensor([low for low, _ in ends], dtype=torch.float64),
        high=torch.tensor([high for _, high in ends], dtype=torch.float64),
        trained=trained,
        correct=correct,
    )


def check_table(model: HookedTransformer, data: Modular) -> None:
    """Raise unless the model reads the tokens of this table: 0 to p - 1 and the equals sign."""
    need_hooked(model, "the table of pairs")
    if not isinstance(data, Modular):
        raise WrongType(f"data is hl.data.modular_arithmetic(...), with the pairs of training; got {data!r:.60}")
    if model.cfg.d_vocab == data.p:
        raise InputError(
            f"the table modulo {data.p} is read from prompts 'a b =', and this model has d_vocab {data.p}: no token '='"
        )
    if model.cfg.d_vocab != data.d_vocab or model.cfg.d_vocab_out < data.p:
        raise InputError(
            f"the table modulo {data.p} has {data.d_vocab} tokens, and this model has d_vocab {model.cfg.d_vocab}: it "
            f"was trained on p = {model.cfg.d_vocab - 1}; give modular_arithmetic({model.cfg.d_vocab - 1}, ...)"
        )
    if model.cfg.n_ctx < 3:
        raise InputError(f"the prompt 'a b =' has 3 tokens, and this model has n_ctx {model.cfg.n_ctx}")


def correct_pairs(model: HookedTransformer, data: Modular) -> Pairs:
    """For every pair (a, b), whether the largest logit is that of its answer."""
    numbers = torch.arange(data.p)
    batch = data.examples(torch.cartesian_prod(numbers, numbers))
    right = run_prompts(model, batch.inputs).argmax(-1) == batch.targets[:, -1]
    return right.view(data.p, data.p)


def _regions(trained: Pairs, data: Modular) -> Iterator[tuple[str, Pairs]]:
    """The regions of the table by name, each as the set of all its pairs."""
    p = data.p
    a, b = torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij")
    yield "all unseen pairs", torch.ones_like(trained)
    if data.operation != "-":  # a - b and b - a have other answers
        yield "partner (b, a) trained", trained.T & (a != b)
        yield "partner (b, a) not trained", ~trained.T & (a != b)
    yield "diagonal a = b", a == b
    if data.operation == "+":
        yield "a + b below p", a + b < p
        yield "a + b at least p", a + b >= p
    support = trained.sum(1)[:, None] + trained.sum(0)[None]  # training pairs that share a row or a column
    low, high = support.double().quantile(support.new_tensor([1 / 3, 2 / 3], dtype=torch.float64)).tolist()
    yield f"row and column with at most {low:.0f} training pairs", support <= low
    yield f"row and column with over {high:.0f} training pairs", support > high
    edge = max(1, round(_EDGE * p))
    outer = (a < edge) | (a >= p - edge), (b < edge) | (b >= p - edge)
    yield f"corners: a and b among the {edge} first or last numbers", outer[0] & outer[1]
    yield "a or b is 0", (a == 0) | (b == 0)


def binomial_interval(n_correct: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share: it covers at least `level` at every n and every true share.

    >>> [round(end, 4) for end in binomial_interval(10, 10)], binomial_interval(0, 0)
    ([0.6915, 1.0], (nan, nan))

    Reference: Clopper and Pearson (1934), "The use of confidence or fiducial limits illustrated in the case of the
    binomial".
    """
    whole("n", n)
    if not 0 <= whole("n_correct", n_correct) <= n:
        raise ArgumentError("{n_correct} is at most n = {0}, got {1}", n, n_correct)
    if not 0 < real("level", level) < 1:
        raise ArgumentError("{level} is between 0 and 1, got {0}", level)
    if not n:
        return math.nan, math.nan
    tail = (1 - level) / 2
    low = 0.0 if not n_correct else _share_with(tail, n_correct, n)
    high = 1.0 if n_correct == n else 1 - _share_with(tail, n - n_correct, n)
    return low, high


def _share_with(tail: float, k: int, n: int) -> float:
    """The share at which `k` or more of `n` have the probability `tail`, by bisection: this grows with the share."""
    counts = torch.arange(k, n + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(counts + 1) - torch.lgamma(n - counts + 1)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        logs = (
            ways + torch.xlogy(counts, counts.new_tensor(share)) + torch.xlogy(n - counts, counts.new_tensor(1 - share))
        )
        low, high = (share, high) if float(logs.logsumexp(0).exp()) < tail else (low, share)
    return (low + high) / 2


def demo(model: HookedTransformer) -> TableRegions | Needs:
    """The table of as many numbers as the model has tokens, but one."""
    lacks = lacking(model)
    if lacks or not 3 <= model.cfg.d_vocab - 1 <= _LARGEST or model.cfg.n_ctx < 3:
        return lacks or Needs(f"4 to {_LARGEST + 1} tokens and 3 positions")
    return measure_regions(model, modular_arithmetic(model.cfg.d_vocab - 1, fraction=0.4))
