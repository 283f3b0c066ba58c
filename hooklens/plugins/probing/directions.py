"""Token embeddings along a probe's direction: a plane of tokens, and how well the direction separates two classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.errors import InputError, WrongType
from hooklens.data.prompts import need_tokens
from hooklens.model.ids import as_ids, show
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.probing.gathering import gather
from hooklens.plugins.probing.labels import odd_first
from hooklens.plugins.probing.probe_use import NULLS, random_directions
from hooklens.plugins.probing.probes import MassMean, Probe
from hooklens.plugins.probing.scoring import Trainer, as_rows
from hooklens.plugins.weights.needs import Needs, needs_tokens
from hooklens.results.result import Result, Table
from hooklens.results.statistics import auc, null_p

_DRAWS = 500  # random directions: each is compared with every row of the embedding
_COLOURS = ("#d55e00", "#0072b2")


@dataclass(frozen=True, eq=False)
class TokenProjection(Result):
    """Token embeddings along a probe's direction (`along`) and along a second one (`across`).

    `auc` is how often a token of class 1 lies further along the direction than one of class 0. `fisher` is the squared
    distance of the class means over the sum of the variances. `random_auc` and `random_fisher` are the same for random
    directions.
    """

    tokens: Int[Tensor, "token"]
    names: list[str]
    label: Int[Tensor, "token"]
    classes: list[str]
    along: Float[Tensor, "token"]
    across: Float[Tensor, "token"]
    across_name: str
    auc: float
    fisher: float
    random_auc: Float[Tensor, "null draw"]
    random_fisher: Float[Tensor, "null draw"]

    @property
    def p(self) -> float:
        """How often a random direction has an AUC as far from 0.5; the larger of the two nulls."""
        null = (self.random_auc - 0.5).abs().T
        return float(null_p(torch.full((len(NULLS),), abs(self.auc - 0.5)).to(null), null).max())

    def table(self, n: int | None = None) -> Table:
        """The separation along the probe's direction, and the value that 95 % of random directions stay below."""
        rows: list[tuple] = [("the probe's direction", self.auc, self.fisher, self.p)]
        for name, area, ratio in zip(NULLS, self.random_auc, self.random_fisher, strict=True):
            folded = (area - 0.5).abs().quantile(0.95) + 0.5
            rows.append((f"random, {name}, 95 % below", folded, ratio.quantile(0.95), None))
        return Table(("direction", "AUC", "Fisher ratio", "p"), rows).head(n)

    def top_tokens(self, k: int = 10) -> Table:
        """The `k` tokens with the largest and the `k` with the smallest coordinate along the direction."""
        order = self.along.argsort(descending=True, stable=True).tolist()
        chosen = [*order[:k], *order[-k:]] if len(order) > 2 * k else order
        rows = [(self.names[i], self.classes[int(self.label[i])], self.along[i]) for i in chosen]
        return Table(("token", "class", "along"), rows)

    def figure(self) -> Any:
        """All tokens in the plane of the two directions, coloured by class."""
        from hooklens.viz.curves import scatter

        high = max(row[1] for row in self.table().rows[1:])
        title = f"Token embeddings: AUC {self.auc:.2f} along the probe; 95 % of random ones below {high:.2f}"
        axes: dict[str, Any] = {"x_title": "along the probe's direction", "y_title": self.across_name}
        figure = None
        for i, name in enumerate(self.classes):
            kept = (self.label == i).nonzero().flatten()
            names = [self.names[token] for token in kept.tolist()]
            of_class = scatter(self.along[kept], self.across[kept], names, title, **axes)
            of_class.update_traces(marker_color=_COLOURS[i], name=name, showlegend=True)
            figure = of_class if figure is None else figure.add_traces(of_class.data)
        return figure


def project_tokens(
    model: HookedTransformer,
    probe: Probe,
    tokens: Sequence[int] | Int[Tensor, "token"],
    label: Sequence[int] | Int[Tensor, "token"],
    *,
    second: Probe | None = None,
    draws: int = _DRAWS,
    seed: int = 0,
) -> TokenProjection:
    """Does a probe's direction separate the token embeddings of two classes, before the model computes anything?

    The embeddings are those that enter the stream, without positions. Use tokens that the probe was not trained on. The
    second axis is `second`'s direction, or the direction of largest variance orthogonal to the first.

    >>> from hooklens.testing import tiny_model
    >>> shown = demo(tiny_model())
    >>> shown.along.shape, shown.random_auc.shape                  # token; null draw
    (torch.Size([11]), torch.Size([2, 100]))
    """
    need_tokens(model, "project_tokens", "measure_geometry compares directions at a point of the model instead")
    label = label.long() if isinstance(label, Tensor) and label.dtype == torch.bool else label
    ids, classes = as_ids(tokens, "tokens are a row of ids"), as_ids(label, "labels are 0 or 1, one per token")
    if ids.ndim != 1 or ids.shape != classes.shape or set(classes.tolist()) != {0, 1}:
        raise InputError(
            f"every token has a label, 0 or 1, got {list(ids.shape)} tokens and {list(classes.shape)} labels, of "
            f"the values {classes.unique().tolist()}"
        )
    with torch.no_grad():
        _, cache = model.run_with_cache(ids[:, None].to(model.device), "hook_embed", stop_at_layer=0)
    embed = cache["hook_embed"][:, 0].cpu()
    embed = embed if embed.dtype == torch.float64 else embed.float()
    where = _axis(probe, embed)
    across, name = _across(embed, where, second)
    random = random_directions(embed, classes, whole("draws", draws, 1), seed)
    along = embed @ where
    projected = (embed @ random.flatten(0, 1).T).T
    return TokenProjection(
        tokens=ids,
        names=show(model, ids),
        label=classes,
        classes=probe.classes,
        along=along,
        across=across,
        across_name=name,
        auc=float(auc(along, classes == 1)),
        fisher=float(fisher(along[None], classes)[0]),
        random_auc=auc(projected, classes == 1).view(random.shape[:2]),
        random_fisher=fisher(projected, classes).view(random.shape[:2]),
    )


def fisher(values: Float[Tensor, "direction row"], label: Int[Tensor, "row"]) -> Float[Tensor, "direction"]:
    """The squared distance of the class means over the sum of the class variances.

    >>> fisher(torch.tensor([[0.0, 2.0, 4.0, 6.0]]), torch.tensor([0, 0, 1, 1])).tolist()
    [8.0]
    """
    (var_0, mean_0), (var_1, mean_1) = (torch.var_mean(values[:, label == i], 1, correction=0) for i in (0, 1))
    return (mean_1 - mean_0) ** 2 / (var_0 + var_1)


def _axis(probe: Probe, embed: Float[Tensor, "token d"]) -> Float[Tensor, "d"]:
    """The direction of a probe, if it is one of vectors such as the embeddings."""
    if not isinstance(probe, Probe):
        raise WrongType(f"a probe is a Probe, such as train_probe gives first; got {probe!r:.60}")
    if probe.weight.shape[1] != embed.shape[1]:
        raise InputError(
            f"this probe reads vectors of size {probe.weight.shape[1]} at {probe.point}, token embeddings have "
            f"{embed.shape[1]}; use a probe of the residual stream"
        )
    return probe.direction.to(embed)


def _across(embed: Tensor, where: Tensor, second: Probe | None) -> tuple[Tensor, str]:
    if second is not None:
        return embed @ _axis(second, embed), f"along the direction of {' | '.join(second.classes)}"
    rest = embed - embed.mean(0)
    rest = rest - (rest @ where)[:, None] * where
    axis = torch.linalg.eigh(rest.T @ rest).eigenvectors[:, -1]
    axis = axis * axis[axis.abs().argmax()].sign()  # the sign of an eigenvector is arbitrary
    return embed @ axis, "largest remaining variance"


def demo(model: HookedTransformer) -> TokenProjection | Needs:
    """Odd and even token numbers along a direction at the first layer; works on any model, without a tokenizer."""
    if lacks := needs_tokens(model):
        return lacks
    task = odd_first(model)
    x = gather(model, task, site="blocks.0.hook_resid_post").x[0]
    fitted = Trainer(MassMean(), 2).fit(as_rows(x), task.label.numpy())
    probe = Probe(*(torch.from_numpy(part).to(x) for part in fitted), classes=task.classes)
    tokens = torch.arange(model.cfg.d_vocab)
    return project_tokens(model, probe, tokens, tokens % 2, draws=100)
