"""A Markov source with known transition probabilities: the entropy of the data is known exactly."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import real, seed_number, whole
from hooklens.core.envelope import digest
from hooklens.core.errors import InputError
from hooklens.data.batches import Batch, TrainingData, drawn_for, next_token_batch

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer

Transitions = Float[Tensor, "state next_state"]
_EVALUATED = 64  # held-out sequences


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

    @property
    def vocabulary(self) -> list[str]:
        """What each token stands for: the number of its state."""
        return [str(state) for state in range(self.d_vocab)]

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """Reads and writes states with spaces between them, such as `0 3 1`."""
        from hooklens.data.vocabularies import spaced_tokenizer

        return spaced_tokenizer(self.vocabulary)

    @cached_property
    def stationary(self) -> Float[Tensor, "state"]:
        """The distribution that a step leaves unchanged: the solution of pi P = pi, sum pi = 1."""
        n = self.d_vocab
        equations = torch.cat([self.transitions.T - torch.eye(n).double(), torch.ones(1, n).double()])
        right = torch.zeros(n + 1, 1, dtype=torch.float64)
        right[-1] = 1
        return torch.linalg.lstsq(equations, right).solution[:, 0].clamp_min(0)

    def entropy_rate(self) -> float:
        """The entropy of the next token given the last one, in nats: the smallest cross-entropy that can be reached."""
        terms = -torch.special.xlogy(self.transitions, self.transitions).sum(1)
        return float(self.stationary @ terms)

    def cross_entropy(self, predicted: Transitions) -> float:
        """The expected loss of a model that predicts these transitions, in nats a token, exactly."""
        terms = -torch.special.xlogy(self.transitions, self._like(predicted)).sum(1)
        return float(self.stationary @ terms)

    def kl(self, predicted: Transitions) -> float:
        """The mean KL divergence of the predicted transitions from the source's, in nats a token, exactly.

        Computed from ratios, it equals `cross_entropy(predicted) - entropy_rate()`.
        """
        ratio = torch.where(self.transitions > 0, self.transitions / self._like(predicted), 1.0)
        return float(self.stationary @ (self.transitions * ratio.log()).sum(1))

    def _like(self, predicted: Transitions) -> Transitions:
        if predicted.shape != self.transitions.shape:
            raise InputError(
                f"predicted holds the probability of each next state given each state, {self.d_vocab} x {self.d_vocab}"
                f"; got {list(predicted.shape)}"
            )
        return predicted.double()

    def sample(self, n: int, generator: torch.Generator) -> Int[Tensor, "sequence pos"]:
        """`n` sequences of window + 1 tokens."""
        state = torch.multinomial(self.stationary, n, replacement=True, generator=generator)
        tokens = [state]
        for _ in range(self.window):
            state = torch.multinomial(self.transitions[state], 1, generator=generator)[:, 0]
            tokens.append(state)
        return torch.stack(tokens, 1)

    def batch(self, step: int, size: int) -> Batch:
        """Fresh sequences."""
        return next_token_batch(self.sample(size, drawn_for(self.seed, step + 1)))

    def held_out(self, size: int) -> Iterator[Batch]:
        """64 sequences of a draw that no step makes."""
        for some in self.sample(_EVALUATED, drawn_for(self.seed, 0)).split(size):
            yield next_token_batch(some)

    def description(self) -> str:
        """What there is to learn."""
        return (
            f"the {self.d_vocab} x {self.d_vocab} transition probabilities of a Markov source: the loss cannot fall "
            f"below {self.entropy_rate():.4f} nats (uniform guessing: {math.log(self.d_vocab):.4f})"
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
    >>> round(source.entropy_rate(), 4), [round(float(p), 4) for p in source.stationary]
    (0.3864, [0.8333, 0.1667])

    The smaller the concentration, the fewer states follow a state. A chain with two parts that never reach each other
    has no entropy rate of its own, and is refused.

    Reference: Cover and Thomas (2006), "Elements of information theory", theorem 4.2.4.
    """
    whole("window", window, 1)
    number = seed_number(seed) % 2**64
    if transitions is None:
        whole("d_vocab", d_vocab, 2)
        if not real("concentration", concentration) > 0:
            raise InputError(f"concentration of the Dirichlet distribution is above 0, got {concentration}")
        alpha = np.full(d_vocab, float(concentration))
        transitions = torch.from_numpy(np.random.default_rng(number).dirichlet(alpha, size=d_vocab))
    return MarkovSource(_checked(transitions.double()), window, seed)


def _checked(rows: Tensor) -> Transitions:
    if rows.ndim != 2 or rows.shape[0] != rows.shape[1] or len(rows) < 2:
        raise InputError(f"transitions is a square matrix of at least 2 states, got {list(rows.shape)}")
    sums = rows.sum(1)
    if not bool((rows >= 0).all()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-6):
        raise InputError(
            "every row of transitions holds probabilities that sum to 1; got sums "
            f"{[round(x, 4) for x in sums.tolist()][:8]} and a smallest entry of {float(rows.min()):.4g}"
        )
    rows = rows / sums[:, None]
    n_parts = len(rows) - int(torch.linalg.matrix_rank(rows - torch.eye(len(rows)).double()))
    if n_parts != 1:
        raise InputError(
            f"transitions has {n_parts} parts that never reach each other, so that the entropy depends on where a "
            "sequence begins; give one in which every state can be reached"
        )
    return rows
