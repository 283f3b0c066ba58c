"""Attention scores of each head: previous token, duplicate token, induction, first position, and entropy."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hooklens.core.component import layer_names
from hooklens.core.errors import did_you_mean
from hooklens.data.demo_prompts import demo_texts
from hooklens.data.prompts import Prompts, reads_vectors
from hooklens.data.repeated import repeated_tokens
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.head_ranking import Head, PerHead, PerSequence, head_table, ranked
from hooklens.plugins.heads.rotations import DRAWS, Mask, mass, pooled_p, rotated_masses
from hooklens.plugins.heads.which import captured, check_model, one_length
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, q_values

KINDS = ("previous", "duplicate", "induction", "first")
#: The labels that repeated tokens can give, the keys whose attention is scored and blocked, and the sign of the loss
#: change that the label predicts.
LABELS = {
    "previous token": ("previous", 1.0),
    "duplicate token": ("duplicate", 1.0),
    "induction": ("induction", 1.0),
    "copy suppression": ("induction", -1.0),
}


@dataclass(frozen=True, eq=False)
class HeadScores(Result):
    """The share of attention that each head pays to four kinds of key, and its entropy in nats.

    `previous`: the token before. `duplicate`: earlier occurrences of the query's own token. `induction`: the tokens
    that followed them. `first`: position 0. Each is a mean over the queries for which such a key exists. `uniform` is
    the score of uniform attention; `p` is how often a head with randomly rotated queries reaches the score
    (`pooled_p`).
    """

    scores: dict[str, PerSequence]
    entropy: PerSequence
    uniform: dict[str, float]
    uniform_entropy: float
    p: dict[str, PerHead]

    def mean(self, kind: str) -> PerHead:
        """A score, averaged over the sequences that have such keys."""
        if kind not in self.scores:
            raise did_you_mean("kind of key", str(kind), self.scores)
        return self.scores[kind].nanmean(0)

    @property
    def q(self) -> dict[str, PerHead]:
        """Benjamini-Hochberg over all heads and kinds together."""
        together = q_values(torch.stack(list(self.p.values())))
        return dict(zip(self.p, together, strict=True))

    def order(self, kind: str = "induction") -> list[Head]:
        """Every (layer, head), the highest score of that kind first."""
        return ranked(self.mean(kind))

    def top_heads(self, k: int = 10, kind: str = "induction") -> Table:
        """The `k` heads with the highest score of one kind, with interval over sequences, p and q."""
        mean, scores = self.mean(kind), self.scores[kind]
        with_keys = ~scores.isnan().flatten(1).all(1)
        low, high = mean_interval(scores[with_keys] if bool(with_keys.any()) else scores)
        columns = {kind: mean, "95% low": low, "95% high": high, "p": self.p[kind], "q": self.q[kind]}
        return head_table(mean, columns, k)

    def table(self, n: int | None = 12) -> Table:
        """One row per head, by largest score except that of the first position; uniform attention last."""
        columns = {kind: self.mean(kind) for kind in KINDS}
        largest = torch.stack([columns[kind].nan_to_num(-1) for kind in KINDS[:3]]).amax(0)
        heads = head_table(largest, columns | {"entropy": self.entropy.mean(0)}, None if n is None else max(0, n - 1))
        even = ("even attention", *(self.uniform[kind] for kind in KINDS), self.uniform_entropy)
        return Table(heads.columns, [*heads.rows, even]).head(n)

    def figure(self) -> Any:
        """Layer by head, four maps side by side: where each head attends."""
        from hooklens.viz.figures import heatmap

        shown = torch.cat([self.mean(kind) for kind in KINDS], 1)
        x = [f"{kind} H{head}" for kind in KINDS for head in range(self.entropy.shape[2])]
        title, y = "Share of attention by kind of key", layer_names(len(shown))
        return heatmap(shown, x=x, y=y, title=title, y_title="layer", diverging=False, colourbar="attention")


def score_heads(
    model: HookedTransformer, prompts: Prompts | None = None, *, n: int = 8, draws: int = DRAWS, seed: int = 0
) -> HeadScores:
    """Where does each head attend, on random tokens that repeat or on your own prompts of one length?

    >>> from hooklens.testing import induction_model
    >>> found = score_heads(induction_model())
    >>> found.mean("previous")[0, 0].item(), found.mean("induction")[1, 1].item()
    (1.0, 1.0)
    >>> found.top_heads(1).rows[0][0], bool(found.q["induction"][1, 1] < 0.05)
    ('L1H1', True)

    The null uses `draws` rotations per head. With `prompts`, `n` is not used.

    Reference: Olsson et al. (2022), "In-context Learning and Induction Heads", section on head-level scores.
    """
    check_model(model, "score_heads")
    tokens = repeated_tokens(model, n, seed=seed).tokens if prompts is None else one_length(model, prompts, least=2)
    masks, layers = key_masks(tokens), range(model.cfg.n_layers)
    _, cache = captured(model, tokens, ["q", "k", "pattern"])
    with torch.no_grad():
        patterns = [cache["pattern", layer] for layer in layers]
        scores = {kind: torch.stack([mass(pattern, mask) for pattern in patterns], 1) for kind, mask in masks.items()}
        null = rotated_masses(model, cache, masks, draws=draws, seed=seed)
    even = [_even(model, layer, tokens) for layer in layers]
    uniform = {kind: torch.stack([mass(pattern, mask).nanmean() for pattern in even]) for kind, mask in masks.items()}
    return HeadScores(
        scores=scores,
        entropy=torch.stack([_entropy(pattern) for pattern in patterns], 1),
        uniform={kind: float(values.double().mean()) for kind, values in uniform.items()},
        uniform_entropy=float(torch.stack([_entropy(pattern).mean() for pattern in even]).double().mean()),
        p={kind: pooled_p(scores[kind].nanmean(0), null[kind]) for kind in masks},
    )


def key_masks(tokens: Shaped[Tensor, "sequence pos *d_in"]) -> dict[str, Mask]:
    """The keys that count for each kind, query by query.

    >>> {kind: mask[0, 3].int().tolist() for kind, mask in key_masks(torch.tensor([[7, 8, 9, 8]])).items()}
    {'previous': [0, 0, 1, 0], 'duplicate': [0, 1, 0, 0], 'induction': [0, 0, 1, 0], 'first': [1, 0, 0, 0]}

    Position 0 counts for `first` only: idle heads attend to it, whatever the token.
    """
    pos = torch.arange(tokens.shape[1], device=tokens.device)
    query, key = pos[:, None], pos
    same = tokens[:, :, None] == tokens[:, None, :]
    earlier = (same if tokens.ndim == 2 else same.all(-1)) & (key < query) & (key > 0)
    after = torch.zeros_like(earlier)
    after[:, :, 1:] = earlier[:, :, :-1]
    return {
        "previous": ((key == query - 1) & (key > 0)).expand_as(earlier),
        "duplicate": earlier,
        "induction": after,
        "first": ((key == 0) & (query > 0)).expand_as(earlier),
    }


def _entropy(pattern: Float[Tensor, "sequence head query_pos key_pos"]) -> Float[Tensor, "sequence head"]:
    """Mean over queries except the first, which has one key; rows that need not sum to 1 are normalised."""
    share = pattern[:, :, 1:].abs()
    share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
    return torch.special.entr(share).sum(-1).mean(-1)


def _even(model: HookedTransformer, layer: int, tokens: Tensor) -> Float[Tensor, "sequence one query_pos key_pos"]:
    pos = torch.arange(tokens.shape[1], device=tokens.device)
    allowed = model.cfg.mask_at(layer).allows(pos[:, None], pos).to(model.dtype)
    return (allowed / allowed.sum(-1, keepdim=True)).expand(len(tokens), 1, -1, -1)


def demo(model: HookedTransformer) -> HeadScores:
    """Four short sequences of random tokens that repeat, or of vectors."""
    return score_heads(model, demo_texts(model, 4, 8) if reads_vectors(model) else None, n=4, draws=50)
