"""Maximum likelihood is minimal cross-entropy is minimal KL divergence: the three, measured on a model and its data."""

import lzma
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.errors import InputError, WrongType
from hooklens.core.precision import widened
from hooklens.data.markov_chains import MarkovSource
from hooklens.data.text_windows import TextWindows
from hooklens.results.result import Result
from hooklens.results.table import Table

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_TARGETS_AT_ONCE = 2**20  # tokens that the compressor is given at a time

LogProbs = Float[Tensor, "target d_vocab"]


@dataclass(frozen=True)
class Divergence:
    """Cross-entropy of a model with a distribution, the distribution's own entropy, and the KL divergence, in nats."""

    cross_entropy: float
    entropy: float
    kl: float


@dataclass(frozen=True, eq=False)
class Likelihood(Result):
    """The loss of a model on held-out tokens, read three ways, in nats a token.

    `loss` is the mean negative log-likelihood of the tokens that occurred, and `standard_error` that of the mean, as if
    they were independent. `empirical_*` compare the model with the distribution of these tokens given their contexts:
    its cross-entropy is the loss. `source_*` compare it with the source that the tokens come from, as `how` says.
    `n_targets` tokens were read, behind `n_contexts` different contexts.
    """

    loss: float
    standard_error: float
    empirical_cross_entropy: float
    empirical_entropy: float
    empirical_kl: float
    source_cross_entropy: float
    source_entropy: float
    source_kl: float
    how: str
    n_targets: int
    n_contexts: int

    baselines: ClassVar[tuple[str, ...]] = ("loss", "how")

    def table(self, n: int | None = None) -> Table:
        """A row for each distribution that the model is compared with."""
        rows = [
            ("these tokens", self.empirical_cross_entropy, self.empirical_entropy, self.empirical_kl),
            ("their source", self.source_cross_entropy, self.source_entropy, self.source_kl),
        ]
        return Table(("compared with", "cross-entropy", "entropy", "KL divergence"), rows).head(n)


def measure_likelihood(model: "HookedTransformer", data: MarkovSource | TextWindows, *, size: int = 32) -> Likelihood:
    """How far is a model from the data, and from the source of the data, in nats a token?

    >>> from hooklens.data.markov_chains import markov_source
    >>> from hooklens.testing import tiny_model
    >>> measured = measure_likelihood(tiny_model(d_vocab=5), markov_source(5, window=8))
    >>> abs(measured.loss - measured.empirical_cross_entropy) < 1e-5
    True
    >>> abs(measured.source_cross_entropy - measured.source_entropy - measured.source_kl) < 1e-9
    True

    The mean negative log-likelihood of tokens is the cross-entropy of the model with their empirical distribution, a
    sum over contexts and tokens weighted by how often each occurs. No entropy depends on the model, so that what
    maximises the likelihood minimises the cross-entropy, and the KL divergence.

    For a `MarkovSource` the source's distribution is known, and its three numbers are exact for the contexts read. For
    `TextWindows` the cross-entropy with the source is estimated by the loss, and its entropy by what lzma needs for the
    held-out text after the training text. This estimate is too large, because lzma knows only what it can match:
    `source_kl` is then too small, and negative where the model predicts the text better than lzma.

    Reference: Cover and Thomas (2006), "Elements of information theory", theorem 5.4.3 and section 11.2.
    """
    whole("size", size, 1)
    if not isinstance(data, MarkovSource | TextWindows):
        raise WrongType(
            f"the entropy is known for a Markov source and estimated for a text, got {type(data).__name__}; give data "
            "of hl.data.markov_source or hl.data.text"
        )
    log_probs, targets, contexts, inputs = _read(model, data, size)
    losses = -log_probs.gather(1, targets[:, None])[:, 0]
    empirical = empirical_divergence(log_probs, targets, contexts)
    if isinstance(data, MarkovSource):
        source, how = source_divergence(data.transitions[inputs], log_probs), "the source's transition probabilities"
    else:
        entropy, mean = compressed_nats(data), float(losses.mean())
        source, how = Divergence(mean, entropy, mean - entropy), "entropy estimated from above by lzma"
    return Likelihood(
        loss=float(losses.mean()),
        standard_error=float(losses.std() / len(losses) ** 0.5),
        empirical_cross_entropy=empirical.cross_entropy,
        empirical_entropy=empirical.entropy,
        empirical_kl=empirical.kl,
        source_cross_entropy=source.cross_entropy,
        source_entropy=source.entropy,
        source_kl=source.kl,
        how=how,
        n_targets=len(losses),
        n_contexts=len(set(contexts)),
    )


def empirical_divergence(log_probs: LogProbs, targets: Int[Tensor, "target"], contexts: list[Any]) -> Divergence:
    """The divergence of predictions from the empirical distribution of the targets given their contexts.

    >>> uniform = torch.full((4, 2), 0.5).double().log()
    >>> seen = empirical_divergence(uniform, torch.tensor([0, 0, 0, 1]), ["x", "x", "y", "y"])
    >>> [round(value / math.log(2), 4) for value in (seen.cross_entropy, seen.entropy, seen.kl)]
    [1.0, 0.5, 0.5]
    """
    pairs = list(zip(contexts, targets.tolist(), strict=True))
    of_context, of_pair = Counter(contexts), Counter(pairs)
    first: dict[Any, int] = {}
    for i, pair in enumerate(pairs):
        first.setdefault(pair, i)  # in the order of of_pair
    rows = torch.tensor(list(first.values()))
    log_q = log_probs[rows, targets[rows]].double()
    joint = torch.tensor([count / len(pairs) for count in of_pair.values()], dtype=torch.float64)
    p = torch.tensor([count / of_context[context] for (context, _), count in of_pair.items()], dtype=torch.float64)
    return Divergence(
        cross_entropy=float(-(joint * log_q).sum()),
        entropy=float(-(joint * p.log()).sum()),
        kl=float((joint * (p.log() - log_q)).sum()),
    )


def source_divergence(probs: Float[Tensor, "target next_state"], log_probs: LogProbs) -> Divergence:
    """The mean divergence of predictions from known distributions; a model may have more tokens than these."""
    probs = torch.nn.functional.pad(probs, (0, log_probs.shape[1] - probs.shape[1]))
    log_ratio = torch.where(probs > 0, probs.log() - log_probs, 0.0)
    return Divergence(
        cross_entropy=float(-torch.where(probs > 0, probs * log_probs, 0.0).sum(1).mean()),
        entropy=float(-torch.special.xlogy(probs, probs).sum(1).mean()),
        kl=float((probs * log_ratio).sum(1).mean()),
    )


def compressed_nats(data: TextWindows) -> float:
    """What lzma needs for the held-out tokens once it has read the training tokens, in nats a token.

    The compressed size of all tokens minus that of the training tokens, an estimate of the entropy from above. The text
    is compressed as tokens, so that other tokenizers give other estimates.
    """
    total, training = (_compressed_bytes(data.tokens, n) for n in (len(data.tokens), data.split_at))
    return 8 * math.log(2) * (total - training) / (len(data.tokens) - data.split_at)


def _compressed_bytes(tokens: Any, n: int) -> int:
    """The size of the first `n` tokens as an xz stream: a byte a token where that is enough, else two or four."""
    largest = int(max(int(part.max()) for part in np.array_split(tokens, 64) if len(part)))
    kind = np.dtype(np.uint8) if largest < 256 else tokens.dtype
    aligned = {1: 0, 2: 1, 4: 2}[kind.itemsize]
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3 - aligned, "lp": aligned, "pb": aligned}]
    compressor, total = lzma.LZMACompressor(filters=filters), 0
    for start in range(0, n, _TARGETS_AT_ONCE):
        total += len(compressor.compress(tokens[start : min(n, start + _TARGETS_AT_ONCE)].astype(kind).tobytes()))
    return total + len(compressor.flush())


def _read(
    model: "HookedTransformer", data: MarkovSource | TextWindows, size: int
) -> tuple[LogProbs, Int[Tensor, "target"], list[bytes], Int[Tensor, "target"]]:
    """The log-probabilities of every held-out target, the targets, all tokens before each, and the last of these."""
    log_probs, targets, contexts, inputs = [], [], [], []
    for batch in data.held_out(size):
        with torch.no_grad():
            logits = widened(model(batch.inputs.to(model.device))).double().cpu()
        if logits.shape[-1] < data.d_vocab:
            raise InputError(f"the model predicts {logits.shape[-1]} tokens, and the data have {data.d_vocab}")
        log_probs.append(logits.log_softmax(-1)[batch.counts])
        targets.append(batch.targets[batch.counts])
        inputs.append(batch.inputs[batch.counts])
        rows = batch.inputs.numpy()
        contexts += [rows[row, : pos + 1].tobytes() for row, pos in batch.counts.nonzero().tolist()]
    return torch.cat(log_probs), torch.cat(targets), contexts, torch.cat(inputs)
