"""Mediation of a head's effect: directly to the logits, through later MLPs, or through later heads."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.progress import progress
from hooklens.data.repeated import repeated_tokens
from hooklens.model.ids import as_ids
from hooklens.model.linear import packed_linears
from hooklens.plugins.heads.copying import refuse_post_norm
from hooklens.plugins.heads.which import Heads, read_heads, refuse_dropout
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, q_values, sign_flip_p
from hooklens.sweeps.measure import Reader

if TYPE_CHECKING:
    from hooklens.core.cache import ActivationCache
    from hooklens.model.transformer import HookedTransformer

ROADS = ("total", "direct", "through MLPs", "through heads", "interaction")


@dataclass(frozen=True, eq=False)
class Mediation(Result):
    """The decrease of the metric without each head, in total and by path, sequence by sequence.

    `total`: everything after the head responds. `direct`: only the final norm and the unembedding respond. `mlps`
    (`later_heads`): later MLPs (heads) respond as well, while later heads (MLPs) keep their values of the untouched
    run, minus the direct effect. `interaction` = total - the other three: paths that need both, and effects that do not
    add.
    """

    heads: list[str]
    total: Float[Tensor, "sequence chosen"]
    direct: Float[Tensor, "sequence chosen"]
    mlps: Float[Tensor, "sequence chosen"]
    later_heads: Float[Tensor, "sequence chosen"]
    base: Float[Tensor, "sequence"]

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

    def top(self, k: int = 10) -> Table:
        """The `k` heads with the largest total effect."""
        return self.table(k)

    def table(self, n: int | None = 12) -> Table:
        """One row per head: total and paths, and interval and q-value of the total; `roads` has those of each path."""
        mean, (low, high), q = self.parts().mean(1), self.interval(), self.q
        rows = [(self.heads[i], *mean[:, i].tolist(), *(float(x[0, i]) for x in (low, high, q))) for i in self._order()]
        return Table(("head", *ROADS, "total low", "total high", "q"), rows).head(n)

    def roads(self, n: int | None = None) -> Table:
        """One row per head and path: the mean decrease, its interval over sequences, and the q-value of "none"."""
        mean, (low, high), q = self.parts().mean(1), self.interval(), self.q
        rows = [
            (self.heads[i], road, *(float(x[at, i]) for x in (mean, low, high, q)))
            for i in self._order()
            for at, road in enumerate(ROADS)
        ]
        return Table(("head", "road", "fall", "95% low", "95% high", "q"), rows).head(n)

    def _order(self) -> list[int]:
        return self.total.mean(0).abs().argsort(descending=True, stable=True).tolist()

    def figure(self) -> Any:
        """Heads down, paths across."""
        from hooklens.viz.figures import heatmap

        shown = self.parts().mean(1).T
        return heatmap(shown, x=ROADS, y=self.heads, title="By which path a head acts", colourbar="fall of the metric")


def mediation(
    model: "HookedTransformer",
    tokens: Int[Tensor, "sequence pos"],
    metric: Any,
    heads: Heads,
    *,
    reference: Int[Tensor, "other other_pos"] | None = None,
) -> Mediation:
    """How much of a head's effect on the metric is direct, through later MLPs, or through later heads?

    Measured by exact interventions. The head's z is replaced by its mean over the `reference` prompts, position by
    position (by default over all positions of the prompts themselves). A head's own block counts as later if its MLP
    reads what attention wrote.

    >>> from hooklens.testing import induction_model
    >>> model = induction_model(); text = repeated_tokens(model, 4)
    >>> found = mediation(model, text.tokens, text.metric(), [(0, 0), (1, 1)])
    >>> found.direct.mean(0).tolist()[0], torch.equal(found.total[:, 1], found.direct[:, 1])
    (0.0, True)

    Reference: Pearl (2001), "Direct and Indirect Effects"; Vig et al. (2020), "Causal Mediation Analysis".
    """
    refuse_post_norm(model)
    refuse_dropout(model)
    tokens, chosen = as_ids(tokens, device=model.device), read_heads(model, heads)
    names = ["z", "attn_out", "mlp_out"]
    with torch.no_grad(), packed_linears(rows=1024):
        stream, cache = model.run_with_cache(tokens, _there(model, names), stop_at_layer=model.cfg.n_layers)
        reader = Reader(model, metric, stream)
        mean = mean_z(model, cache, reference, tokens)
        found: list[list[Tensor]] = []
        with progress("following roads", 4 * len(chosen), unit="runs") as advance:
            for layer, head in chosen:
                runs = []
                for frozen in ((), ("attn_out", "mlp_out"), ("attn_out",), ("mlp_out",)):
                    out = _run(model, tokens, cache=cache, mean=mean, layer=layer, head=head, frozen=frozen)
                    runs.append(reader.base - on_stream(reader, out))
                    advance()
                found.append(runs)
    total, direct, mlps, later = (torch.stack([runs[i] for runs in found], 1) for i in range(4))
    return Mediation(
        heads=[f"L{layer}H{head}" for layer, head in chosen],
        total=total,
        direct=direct,
        mlps=mlps - direct,
        later_heads=later - direct,
        base=reader.base,
    )


def mean_z(
    model: "HookedTransformer", cache: "ActivationCache", reference: Tensor | None, tokens: Tensor
) -> dict[int, Float[Tensor, "one pos head d_head"]]:
    """The mean z by layer: over the reference prompts at each position, or over all positions of the prompts."""
    layers = range(model.cfg.n_layers)
    if reference is None:
        return {
            layer: cache["z", layer].mean((0, 1), keepdim=True).expand(1, tokens.shape[1], -1, -1) for layer in layers
        }
    if reference.shape[1] != tokens.shape[1]:
        raise InputError(
            f"reference prompts have {reference.shape[1]} tokens and the prompts {tokens.shape[1]}; a mean for each "
            "position needs equal lengths"
        )
    _, other = model.run_with_cache(reference, "z", stop_at_layer=model.cfg.n_layers)
    return {layer: other["z", layer].mean(0, keepdim=True) for layer in layers}


def on_stream(reader: Reader, stream: Float[Tensor, "pair pos d_model"]) -> Float[Tensor, "pair"]:
    """Evaluate the metric on the stream, whether or not it declares what it reads."""
    return reader.on_full(reader.model.read_out(stream)) if reader.read is None else reader.on_stream(stream)


def _there(model: "HookedTransformer", names: list[str]) -> list[str]:
    points = model.hook_points()
    return [name for name in names if name != "mlp_out" or "blocks.0.hook_mlp_out" in points]


def _run(
    model: "HookedTransformer",
    tokens: Tensor,
    cache: "ActivationCache",
    mean: dict,
    layer: int,
    head: int,
    frozen: tuple,
) -> Float[Tensor, "sequence pos d_model"]:
    """The last stream without the head; parts in `frozen` keep their output of the untouched run."""

    def without(z: Tensor, hook: Any) -> Tensor:
        z[:, :, head] = mean[layer][:, :, head]
        return z

    def hold(act: Tensor, hook: Any) -> Tensor:
        return cache[hook.name]

    hooks: list = [(("z", layer), without)]
    for name in _there(model, list(frozen)):
        first = (
            layer if name == "mlp_out" else layer + 1
        )  # its own block's MLP may read the head; its attention is edited
        hooks += [(f"blocks.{later}.hook_{name}", hold) for later in range(first, model.cfg.n_layers)]
    return model.run_with_hooks(tokens, fwd_hooks=hooks, stop_at_layer=model.cfg.n_layers)


def demo(model: "HookedTransformer") -> Mediation:
    """Two heads on short sequences that repeat; works on any model whose blocks are not post-norm."""
    both = repeated_tokens(model, 8, length=13)
    text, others = both.part(0, 4), both.part(4, 8)
    heads = [(0, 0), (model.cfg.n_layers - 1, model.cfg.n_heads - 1)]
    return mediation(model, text.tokens, text.metric(), heads, reference=others.tokens)
