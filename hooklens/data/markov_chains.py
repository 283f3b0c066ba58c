"""A Markov source with known transition probabilities: the entropy of the data is known exactly."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded, whole
from hooklens.core.envelope import digest
from hooklens.core.errors import InputError
from hooklens.data.batches import Batch, TrainingData, next_token_batch

Transitions = Float[Tensor, "state next_state"]


@dataclass(frozen=True, eq=False)
class MarkovSource(TrainingData):
    """Sequences in which each token depends on the one before it only, begun from the stationary distribution."""

    transitions: Transitions = field(repr=False)
    window: int
    seed: int

    @property
    def d_vocab(self) -> int:
        """The number of states."""
        return len(self.transitions)

    def stationary(self) -> Float[Tensor, "state"]:
        """The distribution that a step leaves unchanged: the solution of pi P = pi, sum pi = 1."""
        n = self.d_vocab
        equations = torch.cat([self.transitions.T - torch.eye(n, dtype=torch.float64), torch.ones(1, n).double()])
        right = torch.zeros(n + 1, dtype=torch.float64)
        right[-1] = 1
        return torch.linalg.lstsq(equations, right[:, None]).solution[:, 0].clamp_min(0)

    def entropy_rate(self) -> float:
        """The entropy of the next token given the last one, in nats: the smallest cross-entropy that can be reached."""
        terms = -torch.special.xlogy(self.transitions, self.transitions).sum(1)
        return float(self.stationary() @ terms)

    def cross_entropy(self, predicted: Transitions) -> float:
        """The expected loss of a model that predicts these transitions, in nats a token, exactly."""
        terms = -torch.special.xlogy(self.transitions, predicted.double()).sum(1)
        return float(self.stationary() @ terms)

    def kl(self, predicted: Transitions) -> float:
        """The mean KL divergence of the predicted transitions, exactly: cross-entropy minus entropy rate."""
        ratio = self.transitions / predicted.double()
        terms = torch.special.xlogy(self.transitions, torch.where(self.transitions > 0, ratio, 1.0)).sum(1)
        return float(self.stationary() @ terms)

    def sample(self, n: int, seed: int) -> Int[Tensor, "sequence pos"]:
        """`n` sequences of window + 1 tokens."""
        generator = seeded(seed)
        state = torch.multinomial(self.stationary(), n, replacement=True, generator=generator)
        tokens = [state]
        for _ in range(self.window):
            state = torch.multinomial(self.transitions[state], 1, generator=generator)[:, 0]
            tokens.append(state)
        return torch.stack(tokens, 1)

    def batch(self, step: int, size: int) -> Batch:
        """Fresh sequences."""
        return next_token_batch(self.sample(size, self.seed * 2**32 + 2 * step))

    def held_out(self, size: int) -> Iterator[Batch]:
        """64 sequences that no step draws."""
        for i, start in enumerate(range(0, 64, size)):
            yield next_token_batch(self.sample(min(size, 64 - start), self.seed * 2**32 + 2 * i + 1))

    def description(self) -> str:
        """What there is to learn."""
        return (
            f"the {self.d_vocab} x {self.d_vocab} transition probabilities of a Markov source: the loss cannot fall below "
            f"{self.entropy_rate():.4f} nats (uniform guessing: {math.log(self.d_vocab):.4f})"
        )

    def identity(self) -> dict[str, Any]:
        """What identifies the data."""
        matrix = digest([self.transitions.numpy().tobytes()])
        return {"task": "markov", "transitions": matrix, "window": self.window, "seed": self.seed}


def markov_source(
    d_vocab: int = 8,
    *,
    transitions: Transitions | None = None,
    concentration: float = 0.3,
    window: int = 32,
    seed: int = 0,
) -> MarkovSource:
    """A source with the given transition matrix, or one whose rows are drawn from a Dirichlet distribution.

    >>> source = markov_source(transitions=torch.tensor([[0.9, 0.1], [0.5, 0.5]]))
    >>> round(source.entropy_rate(), 4), [round(float(p), 4) for p in source.stationary()]
    (0.3864, [0.8333, 0.1667])
    """
    whole("window", window, 1)
    if transitions is None:
        whole("d_vocab", d_vocab, 2)
        if not concentration > 0:
            raise InputError(f"concentration of the Dirichlet distribution is above 0, got {concentration}")
        gamma = torch._standard_gamma(
            torch.full((d_vocab, d_vocab), concentration, dtype=torch.float64), generator=seeded(seed)
        ).clamp_min(1e-12)
        transitions = gamma / gamma.sum(1, keepdim=True)
    rows = transitions.double()
    if rows.ndim != 2 or rows.shape[0] != rows.shape[1] or bool((rows < 0).any()):
        raise InputError(f"transitions is a square matrix of probabilities, got {list(rows.shape)}")
    if not torch.allclose(rows.sum(1), torch.ones(len(rows)).double(), atol=1e-6):
        raise InputError(f"every row of transitions sums to 1, got {[round(float(x), 4) for x in rows.sum(1)][:8]}")
    return MarkovSource(rows / rows.sum(1, keepdim=True), window, seed)
