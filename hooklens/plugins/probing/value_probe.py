"""Linear probes for numbers: can a value, such as the answer or the weights of a regression, be read from a point?"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooklens.core.arguments import seeded, whole
from hooklens.core.errors import InputError, WrongType
from hooklens.core.names import Where, parse
from hooklens.data.demo_prompts import demo_texts
from hooklens.data.prompts import Prompts, row_key, rows_of
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.probing.gathering import Activations, gather
from hooklens.plugins.probing.ridge_folds import (
    deal_folds,
    exchanged,
    explained,
    fit_ridge,
    means_out_of_fold,
    out_of_fold,
)
from hooklens.plugins.probing.task import PerPrompt, components, one_per_prompt
from hooklens.results.result import Result, Table
from hooklens.results.statistics import null_p

_FOLDS = 5
_FEWEST = 10  # groups
_DRAWS = 99  # each draw is a regression of its own at every point, fold and ridge


class ValueProbe(nn.Module):
    """A linear map from the activation at `point` to values, in the activation's units."""

    def __init__(self, weight: Float[Tensor, "target d"], bias: Float[Tensor, "target"], *, point: str | None = None):
        super().__init__()
        self.weight, self.bias, self.point = nn.Parameter(weight.clone()), nn.Parameter(bias.clone()), point

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch target"]:
        """The values read from activations."""
        return x @ self.weight.T + self.bias


@dataclass(frozen=True, eq=False)
class ValueStudy(Result):
    """How well values can be read from activations, out of fold, beside what can be read without the model.

    `nested` is the number to report: each fold's predictions at the point that the other folds chose by leave-one-out.
    `predicted` is the same at every point (choosing the best of these uses the test examples). `embed` and `context`
    are predicted from the input at that position as it enters the stream, and from its mean over the prompt so far.
    `null` is the R^2 of `nested` for values that were exchanged between prompts, one row per draw.
    """

    baselines = ("r2",)
    ranked_by = "R2"
    terms = {
        "R2": "1 minus the squared error, out of fold, over that of the mean value: 1 all, 0 nothing, below 0 worse",
        "p": "how often exchanged values are read as well at a point chosen in the same way",
    }

    points: list[str]
    targets: list[str]
    value: Float[Tensor, "example target"]
    mean: Float[Tensor, "example target"]
    group: Int[Tensor, "example"]
    fold: Int[Tensor, "example"]
    chosen: Int[Tensor, "fold"]
    nested: Float[Tensor, "example target"]
    predicted: Float[Tensor, "point example target"]
    embed: Float[Tensor, "example target"]
    context: Float[Tensor, "example target"]
    null: Float[Tensor, "draw target"]
    best: int

    @property
    def r2(self) -> float:
        """R^2 at the points chosen inside the folds, mean over targets."""
        return float(self.by_target.mean())

    @property
    def by_target(self) -> Float[Tensor, "target"]:
        """The same for each target."""
        return explained(self.value, self.nested, self.mean)

    @property
    def by_point(self) -> Float[Tensor, "point"]:
        """R^2 at each point, mean over targets."""
        return explained(self.value, self.predicted, self.mean).mean(-1)

    @property
    def p(self) -> float:
        """How often exchanged values have an R^2 as large, each at points chosen in the same way; NaN without draws."""
        return (
            float(null_p(torch.tensor(self.r2, dtype=self.null.dtype), self.null.mean(1)))
            if len(self.null)
            else torch.nan
        )

    @property
    def point(self) -> str:
        """The point that the probe reads: the best by leave-one-out on all examples."""
        return self.points[self.best]

    def table(self, n: int | None = None) -> Table:
        """The R^2 at the points chosen inside, at every point, and of the two baselines."""
        rows: list[tuple] = [("point chosen inside", self.r2, self.p)]
        rows += [(name, float(r2), None) for name, r2 in zip(self.points, self.by_point, strict=True)]
        for name, predicted in (("the input's embedding", self.embed), ("mean embedding so far", self.context)):
            rows.append((name, float(explained(self.value, predicted, self.mean).mean()), None))
        if len(self.null):
            rows.append(("exchanged values", float(self.null.mean()), None))
        return Table(("read from", "R2", "p"), rows).head(n)

    def top_targets(self, k: int = 10) -> Table:
        """The `k` targets that are read best."""
        order = self.by_target.argsort(descending=True, stable=True)[:k].tolist()
        return Table(("target", "R2"), [(self.targets[i], float(self.by_target[i])) for i in order])

    def figure(self) -> Any:
        """R^2 by point, with lines for the baselines and for exchanged values."""
        from hooklens.viz.curves import lines

        marks = {"mean embedding of the prompt": self.context, "input's embedding": self.embed}
        heights = {name: float(explained(self.value, x, self.mean).mean()) for name, x in marks.items()}
        heights |= {"exchanged values": float(self.null.mean())} if len(self.null) else {}
        layers = [getattr(parse(name), "layer", None) for name in self.points]
        by_layer = None not in layers and len(set(layers)) == len(layers) > 1
        figure = lines(
            {"probe": self.by_point},
            torch.tensor(layers) if by_layer else None,
            None,
            f"Values read linearly: R2 {self.r2:.2f} at the point chosen inside",
            x_title="layer" if by_layer else "point",
            y_title="R2 out of fold",
            marks=heights,
        )
        return figure if len(self.points) > 1 else figure.update_traces(mode="markers", selector={"mode": "lines"})


def train_value_probe(
    model: HookedTransformer,
    prompts: Prompts,
    values: Any,
    *,
    site: Where = "resid_post",
    pos: int | PerPrompt = -1,
    group: PerPrompt | None = None,
    draws: int = _DRAWS,
    seed: int = 0,
) -> tuple[ValueProbe, ValueStudy]:
    """Can numbers be read linearly from the activations at one position of each prompt, and at which layer?

    `values` is one number per prompt or `[prompt target]`, such as the answers or the weights w of prompts of
    in-context regression. Ridge regressions are fitted in five folds; the ridge, and the layer, are chosen by
    leave-one-out on the training rows. Prompts of one `group` are never split between training and test.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model(embed={"part": "vectors", "d_in": 3}, d_vocab_out=1)
    >>> x = torch.randn(40, 5, 3, generator=torch.Generator().manual_seed(0))
    >>> probe, study = train_value_probe(model, x, x[:, -1, 0])             # a number of the last vector itself
    >>> round(study.r2, 1), study.predicted.shape                           # point example target
    (0.8, torch.Size([2, 40, 1]))

    Reference: Akyürek et al. (2023), "What learning algorithm is in-context learning? Investigations with linear
    models", section 5, probes for the moment vector and the weights.
    """
    whole("draws", draws)
    rows = rows_of(model, prompts, "prompts")
    y, acts = _values(values, len(rows)), gather(model, rows, site=site, pos=pos)
    labels = list(range(len(rows))) if group is None else one_per_prompt("group", group, len(rows))
    linked = components([[row_key(row), ("group", label)] for row, label in zip(rows, labels, strict=True)])
    n_groups = len(linked.unique())
    if n_groups < _FEWEST:
        raise InputError(f"a probe for values needs at least {_FEWEST} prompts that share nothing, got {n_groups}")
    study = _study(acts, y, linked, draws=draws, seed=seed)
    fit = fit_ridge(acts.x[study.best].double(), y)
    return ValueProbe(fit.weight.to(acts.x), fit.bias.to(acts.x), point=study.point), study


def _study(
    acts: Activations, y: Float[Tensor, "example target"], group: Tensor, *, draws: int, seed: int
) -> ValueStudy:
    """Every point out of fold, for the values and for exchanged ones, and the point that each fold chooses."""
    fold, generator, n = deal_folds(group, _FOLDS, seed), seeded(seed), y.shape[1]
    orders = [torch.arange(len(y)), *(exchanged(group, generator) for _ in range(draws))]
    every = torch.cat([y[order] for order in orders], 1)  # the values' columns, then those of each draw
    scored = [out_of_fold(x.double(), every, fold) for x in acts.x]
    predicted = torch.stack([of_point for of_point, _ in scored]).unflatten(2, (-1, n))  # point example draw target
    # in units of each target's variance, so that all targets count alike; point fold draw
    left_out = (torch.stack([error for _, error in scored]).unflatten(2, (-1, n)) / y.var(0)).mean(-1)
    chosen = left_out.argmin(0)
    picked = predicted.gather(0, chosen[fold][None, :, :, None].expand(1, -1, -1, n))[0]
    truth, mean = every.unflatten(1, (-1, n)), means_out_of_fold(every, fold).unflatten(1, (-1, n))
    r2 = explained(truth.transpose(0, 1), picked.transpose(0, 1), mean.transpose(0, 1))
    whole_fit = torch.stack([(fit_ridge(x.double(), y).left_out / y.var(0)).mean() for x in acts.x])
    return ValueStudy(
        points=acts.points,
        targets=[f"value {i}" for i in range(n)] if n > 1 else ["value"],
        value=y,
        mean=mean[:, 0],
        group=group,
        fold=fold,
        chosen=chosen[:, 0],
        nested=picked[:, 0],
        predicted=predicted[:, :, 0],
        embed=out_of_fold(acts.embed.double(), y, fold)[0],
        context=out_of_fold(acts.context.double(), y, fold)[0],
        null=r2[1:],
        best=int(whole_fit.argmin()),
    )


def _values(values: Any, n: int) -> Float[Tensor, "example target"]:
    """The values as [prompt target]; each target must vary."""
    what = "values is one number per prompt, or numbers [prompt target]"
    try:
        y = torch.as_tensor(values).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongType(f"{what}; got {values!r:.60}") from error
    y = y[:, None] if y.ndim == 1 else y
    if y.ndim != 2 or len(y) != n or not y.shape[1] or not bool(y.isfinite().all()):
        raise InputError(f"{what}, finite; got {list(y.shape)} for {n} prompts")
    constant = (y == y[0]).all(0).nonzero().flatten().tolist()
    if constant:
        raise InputError(f"the values of target {constant[0]} are all {float(y[0, constant[0]]):g}: nothing to read")
    return y


def demo(model: HookedTransformer) -> ValueStudy:
    """The first number of the last vector, or the last token's number, of twenty prompts."""
    prompts = demo_texts(model, 20, 4)
    values = (prompts[:, -1, 0] if prompts.ndim == 3 else prompts[:, -1]).double()
    values = values + torch.linspace(0, 1, len(values), device=values.device)  # prompts may end alike
    return train_value_probe(model, prompts, values, draws=19)[1]
