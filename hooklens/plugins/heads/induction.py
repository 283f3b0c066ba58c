"""Which heads continue repeated text? The attention score, and the increase of the loss under ablation."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.component import head_name, head_names
from hooklens.core.errors import InputError
from hooklens.data.prompts import need_tokens
from hooklens.data.repeated import repeated_tokens
from hooklens.metrics import loss as loss_of
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.head_ranking import Head, PerHead, PerSequence, head_table, ranked
from hooklens.plugins.heads.head_scores import key_masks
from hooklens.plugins.heads.rotations import mass
from hooklens.plugins.heads.which import Heads, captured, check_model
from hooklens.plugins.patching.ablation import ablate
from hooklens.plugins.weights.needs import Needs, needs_tokens
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, q_values, sign_flip_p
from hooklens.sweeps.nodes import read_heads


@dataclass(frozen=True, eq=False)
class InductionHeads(Result):
    """Induction score and loss increase of every head, sequence by sequence.

    `score` is the attention to the tokens that followed earlier occurrences of the query's token, in sequences with
    different periods, over the queries that have such a key. `offset_score` is the score of the literature: the mean
    attention from each query to the key one less than a fixed period back, on other random tokens repeated once; a head
    that attends to this distance whatever the tokens scores too. `rise` is the increase of the loss on the repeated
    tokens, in nats per token, when the head's output is replaced by its mean over other sequences. `rise_before` is the
    same for the tokens before any repeat, where there is nothing to copy: a head with a large value is useful, but not
    for induction. NaN for heads that were not ablated.
    """

    ranked_by = "induction score"

    terms = {
        "before repeats": "the control: the increase of the loss before any repeat, where there is nothing to copy",
    }

    score: PerSequence
    offset_score: PerSequence
    rise: PerSequence
    rise_before: PerSequence
    loss: Float[Tensor, "sequence"]
    loss_before: Float[Tensor, "sequence"]
    chance: float

    @property
    def q(self) -> PerHead:
        """Benjamini-Hochberg over the ablated heads, from sign flips of whole sequences."""
        return q_values(sign_flip_p(self.rise))

    def interval(self, level: float = 0.95) -> tuple[PerHead, PerHead]:
        """The interval of the mean `rise`, from a bootstrap over sequences."""
        return mean_interval(self.rise, level=level)

    def order(self) -> list[Head]:
        """Every (layer, head), the highest score first."""
        return ranked(self.score.mean(0))

    def table(self, n: int | None = 12) -> Table:
        """One row per head: both scores, the loss increase after and before a repeat, and the q-value."""
        low, high = self.interval()
        columns = {"score": self.score.mean(0), "at fixed offset": self.offset_score.mean(0)}
        columns |= {"loss rise": self.rise.mean(0), "95% low": low, "95% high": high}
        columns |= {"before repeats": self.rise_before.mean(0), "q": self.q}
        return head_table(columns["score"], columns, n)

    def figure(self) -> Any:
        """Every head by score and loss increase: heads that attend but have no effect lie at the lower right."""
        from hooklens.viz.curves import scatter

        names = head_names(self.score.shape[1], self.score.shape[2])
        seen = ~self.rise[0].isnan().flatten()
        return scatter(
            self.score.mean(0).flatten()[seen],
            self.rise.mean(0).flatten()[seen],
            [name for name, here in zip(names, seen.tolist(), strict=True) if here],
            "Induction score and loss increase under ablation",
            x_title="attention to what followed the last occurrence",
            y_title="loss rise on repeats (nats per token)",
            colour=self.rise_before.mean(0).flatten()[seen],
            colourbar="before repeats",
        )


def find_induction_heads(
    model: HookedTransformer, *, n: int = 8, length: int = 25, heads: Heads | None = None, seed: int = 0
) -> InductionHeads:
    """Which heads are induction heads: which attend to the token that came next, and which does the loss depend on?

    Each of `heads` (all by default) is ablated alone: its z is replaced by the mean, position by position, over as many
    other sequences that repeat with other periods. The result is exact, computed by the sweep engine.

    >>> from hooklens.testing import induction_model
    >>> found = find_induction_heads(induction_model())
    >>> found.score.mean(0)[1].tolist(), bool(found.loss.mean() < 0.01), bool(found.rise.mean(0)[1, 1] > 1)
    ([0.0..., 1.0], True, True)

    Reference: Olsson et al. (2022), "In-context Learning and Induction Heads", arguments 3 and 4; `offset_score` as in
    TransformerLens's main demo ("induction stripe").
    """
    check_model(model, "find_induction_heads")
    need_tokens(model, "find_induction_heads", "hl.heads.score_heads(model, prompts) reads vectors")
    if whole("n", n) < 2:
        raise InputError(f"an interval needs at least two sequences, got n={n}")
    both = repeated_tokens(model, 2 * n, length=length, seed=seed)
    sequences, others, chosen = both.part(0, n), both.part(n, 2 * n), read_heads(model, heads)
    before = sequences.first_part  # up to here nothing is repeated
    with torch.no_grad(), packed_linears(rows=1024):
        mask = key_masks(sequences.tokens)["induction"]
        _, cache = captured(model, sequences.tokens, "pattern")
        score = torch.stack([mass(cache["pattern", layer], mask) for layer in range(model.cfg.n_layers)], 1)
        offset_score = _at_fixed_offset(model, n, length, seed)
        mean = {name: z.mean(0, keepdim=True) for name, z in captured(model, others.tokens, "z")[1].items()}
        rise, loss = _ablated(model, sequences.tokens, sequences.metric(), chosen, mean)
        rise_before, loss_before = torch.zeros_like(rise), torch.zeros_like(loss)
        if before > 1:
            first = sequences.tokens[:, :before]
            rise_before, loss_before = _ablated(model, first, loss_of(model, first), chosen, mean)
    chance = float((mask.sum(-1) / torch.arange(1, mask.shape[1] + 1).to(mask.device))[mask.any(-1)].mean())
    return InductionHeads(
        score=score,
        offset_score=offset_score,
        rise=rise,
        rise_before=rise_before,
        loss=loss,
        loss_before=loss_before,
        chance=chance,
    )


def _at_fixed_offset(model: HookedTransformer, n: int, length: int, seed: int) -> PerSequence:
    """The mean of the diagonal of each pattern that lies period - 1 below the main one, on tokens repeated once."""
    period = int(repeated_tokens(model, 1, length=length).period.max())  # the longest that this model allows
    tokens = repeated_tokens(model, n, length=2 * period + 1, period=period, seed=seed + 1).tokens[:, 1:]
    _, cache = captured(model, tokens, "pattern")
    diagonals = [cache["pattern", i].diagonal(1 - period, -2, -1).mean(-1) for i in range(model.cfg.n_layers)]
    return torch.stack(diagonals, 1)


def _ablated(
    model: HookedTransformer, tokens: Tensor, metric: Any, heads: list[Head], mean: dict[str, Tensor]
) -> tuple[PerSequence, Float[Tensor, "sequence"]]:
    """The increase of the loss without each head, NaN for the others; and the loss of the untouched run."""
    value = {name: z[:, : tokens.shape[1]] for name, z in mean.items()}
    sweep = ablate(model, tokens, metric, value=value, patches=[head_name(*head) for head in heads])
    layers, which = zip(*heads, strict=True)
    rise = sweep.per_prompt.new_full((len(tokens), model.cfg.n_layers, model.cfg.n_heads), torch.nan)
    rise[:, layers, which] = -sweep.effect_per_prompt
    return rise, -sweep.base_per_prompt


def demo(model: HookedTransformer) -> InductionHeads | Needs:
    """Four short sequences; works on any model that reads tokens."""
    return needs_tokens(model) or find_induction_heads(model, n=4, length=13)
