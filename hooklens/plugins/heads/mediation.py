"""Mediation of a head's effect: directly to the logits, through later MLPs, or through later heads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.cache import ActivationCache
from hooklens.core.component import head_name
from hooklens.core.hooks import HookFn
from hooklens.core.names import Where
from hooklens.data.prompts import Pairs, Prompts
from hooklens.metrics import need_metric
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.head_ranking import Head, head_table, in_order
from hooklens.plugins.heads.which import Heads, captured, check_model, demo_sequences, one_length
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, q_values, sign_flip_p
from hooklens.sweeps.many_edits import Edits, Hooks, Index, run_edits
from hooklens.sweeps.nodes import read_heads
from hooklens.sweeps.planning import points_of
from hooklens.sweeps.replacement import Mean, Value, activations_of, are_prompts, as_replacement, targets_of
from hooklens.sweeps.resume import Resume, resuming

ROADS = ("total", "direct", "through MLPs", "through heads", "interaction")


@dataclass(frozen=True, eq=False)
class Mediation(Result):
    """The decrease of the metric without each head, in total and by path, sequence by sequence.

    `total`: everything after the head responds. `direct`: only the final norm and the unembedding respond. `mlps`
    (`later_heads`): later MLPs (heads) respond as well, while later heads (MLPs) keep their values of the untouched
    run, minus the direct effect. `interaction` = total - the other three: paths that need both, and effects that do not
    add.
    """

    ranked_by = "total effect"

    heads: list[str]
    total: Float[Tensor, "sequence chosen"]
    direct: Float[Tensor, "sequence chosen"]
    mlps: Float[Tensor, "sequence chosen"]
    later_heads: Float[Tensor, "sequence chosen"]
    base_per_sequence: Float[Tensor, "sequence"]

    @property
    def interaction(self) -> Float[Tensor, "sequence chosen"]:
        """The part of the total that the three separate paths do not explain."""
        return self.total - self.direct - self.mlps - self.later_heads

    def parts(self) -> Float[Tensor, "road sequence chosen"]:
        """Total, direct, through MLPs, through heads, interaction."""
        return torch.stack([self.total, self.direct, self.mlps, self.later_heads, self.interaction])

    def interval(self, level: float = 0.95) -> tuple[Float[Tensor, "road chosen"], Float[Tensor, "road chosen"]]:
        """The interval of every mean, from a bootstrap over sequences."""
        return mean_interval(self.parts().transpose(0, 1), level=level)

    @property
    def q(self) -> Float[Tensor, "road chosen"]:
        """Benjamini-Hochberg over heads and paths, from sign flips of whole sequences."""
        return q_values(sign_flip_p(self.parts().transpose(0, 1)))

    def table(self, n: int | None = 12) -> Table:
        """One row per head: total and paths, and interval and q-value of the total; `roads` has those of each path."""
        low, high = self.interval()
        columns = dict(zip(ROADS, self.parts().mean(1), strict=True))
        columns |= {"total low": low[0], "total high": high[0], "q": self.q[0]}
        return head_table(columns["total"].abs(), columns, n, names=self.heads)

    def roads(self, n: int | None = None) -> Table:
        """One row per head and path: the mean decrease, its interval over sequences, and the q-value of "none"."""
        mean, (low, high), q = self.parts().mean(1), self.interval(), self.q
        rows = [
            (self.heads[i], road, *(float(x[at, i]) for x in (mean, low, high, q)))
            for i in in_order(mean[0].abs())
            for at, road in enumerate(ROADS)
        ]
        return Table(("head", "road", "fall", "95% low", "95% high", "q"), rows).head(n)

    def figure(self) -> Any:
        """Heads down, paths across."""
        from hooklens.viz.figures import heatmap

        shown = self.parts().mean(1).T
        return heatmap(shown, x=ROADS, y=self.heads, title="By which path a head acts", colourbar="fall of the metric")


def measure_mediation(
    model: HookedTransformer,
    tokens: Prompts,
    metric: Any,
    heads: Heads,
    *,
    value: Value = "mean over positions",
    resume: str | Path | Resume | None = None,
) -> Mediation:
    """How much of a head's effect on the metric is direct, through later MLPs, or through later heads?

    `value` is what is written in place of the head's z, as in `hl.ablate`: its mean over all positions of the prompts,
    or `hl.Mean(reference=prompts)` by position. A head's own block counts as later where its MLP reads what attention
    wrote. `resume` names a file that keeps finished runs, as in `hl.patch`.

    >>> from hooklens.data.repeated import repeated_tokens
    >>> from hooklens.testing import induction_model
    >>> model = induction_model(); text = repeated_tokens(model, 4)
    >>> found = measure_mediation(model, text.tokens, text.metric(), [(0, 0), (1, 1)])
    >>> found.direct.mean(0).tolist()[0], torch.equal(found.total[:, 1], found.direct[:, 1])
    (0.0, True)

    Reference: Pearl (2001), "Direct and Indirect Effects"; Vig et al. (2020), "Causal Mediation Analysis".
    """
    check_model(model, "measure_mediation")
    need_metric(metric)
    model.blocks[0].need_sum("a head's direct path to the logits")
    tokens, chosen = one_length(model, tokens), read_heads(model, heads)
    with resuming(resume, "measure_mediation") as file:
        _, cache = captured(model, tokens, _there(model, ["z", "attn_out", "mlp_out"]))
        written = written_z(model, tokens, cache, value)
        runs = [
            partial(_hooks, cache=cache, written=written, at=at, frozen=_there(model, frozen))
            for at in chosen
            for frozen in ((), ("attn_out", "mlp_out"), ("attn_out",), ("mlp_out",))
        ]
        edits = ablations("mediation", runs, chosen, value=value, written=written)
        (outcome,) = run_edits(model, [(edits, tokens, metric)], title="following roads", resume=file)
    falls = outcome.base - outcome.values
    total, direct, mlps, later = falls.view(len(chosen), 4, -1).permute(1, 2, 0)
    return Mediation(
        heads=[head_name(layer, head) for layer, head in chosen],
        total=total,
        direct=direct,
        mlps=mlps - direct,
        later_heads=later - direct,
        base_per_sequence=outcome.base,
    )


def ablations(
    what: str, runs: Sequence[Callable[[Index], Hooks]], heads: Sequence[Head], value: Value, written: dict[str, Tensor]
) -> Edits:
    """Runs in which some of these heads' z are exchanged for what is written."""

    def hooks(index: Index) -> Hooks:
        return [hook for number in index.unique().tolist() for hook in runs[number]((index == number).nonzero()[:, 0])]

    asked = (what, heads), {"the value to write": as_replacement(value)}
    return Edits(len(runs), hooks, min(layer for layer, _ in heads), asked=asked, sketch=list(written.values()))


def written_z(
    model: HookedTransformer, tokens: Tensor, cache: ActivationCache, value: Value
) -> dict[str, Float[Tensor, "sequence pos head d_head"]]:
    """What is written at every z in place of what the prompts hold there."""
    pairs = Pairs(tuple(range(len(tokens))), tokens, tokens)
    points = points_of(model, "z")
    (target,) = targets_of(model, [pairs], points, paired=False)
    (written,) = as_replacement(value).once([target])
    own = {name: cache[name] for name in points}
    return activations_of(target.read(written) if are_prompts(written, tokens) else written, own)


def _there(model: HookedTransformer, names: Sequence[str]) -> list[str]:
    points = model.hook_points()
    return [name for name in names if name != "mlp_out" or "blocks.0.hook_mlp_out" in points]


def _hooks(rows: Index, cache: ActivationCache, written: dict[str, Tensor], at: Head, frozen: Sequence[str]) -> Hooks:
    """In these rows the head is replaced, and later parts named in `frozen` keep their value of the untouched run."""

    def hold(act: Tensor, hook: Any) -> Tensor:
        act[rows] = cache[hook.name]
        return act

    hooks = [without(rows, written, at)]
    for name in frozen:
        # the own block's MLP may read the head; its attention is edited
        first = at[0] if name == "mlp_out" else at[0] + 1
        hooks += [((name, later), hold) for later in range(first, len(written))]
    return hooks


def without(rows: Index, written: dict[str, Tensor], at: Head) -> tuple[Where, HookFn]:
    """A hook that replaces a head's z, in these rows."""
    layer, head = at

    def edit(z: Tensor, hook: Any) -> Tensor:
        z[rows, :, head] = written[hook.name][:, :, head]
        return z

    return ("z", layer), edit


def demo(model: HookedTransformer) -> Mediation:
    """The first and last head on short sequences that repeat; works on any model whose blocks are not post-norm."""
    tokens, metric, others = demo_sequences(model)
    heads = dict.fromkeys([(0, 0), (model.cfg.n_layers - 1, model.cfg.n_heads - 1)])
    return measure_mediation(model, tokens, metric, list(heads), value=Mean(others))
