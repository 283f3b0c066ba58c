"""Three names of one number: mean negative log-likelihood, cross-entropy, and entropy plus KL divergence."""

import lzma
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.precision import widened
from hooklens.data.batches import Batch
from hooklens.data.markov_chains import MarkovSource
from hooklens.data.text_windows import TextWindows
from hooklens.metrics import kl_divergence
from hooklens.results.result import Result

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer


@dataclass(frozen=True, eq=False)
class Likelihood(Result):
    """Nats a token, over the same targets.

    `likelihood` is the mean of -log q(token) over the tokens that occurred, with its standard error. `cross_entropy`
    replaces each token by its distribution given the context; `entropy` is that distribution's own, and `kl` the
    divergence from it. cross_entropy = entropy + kl holds at every target. Where the distribution is not known, `kl` is
    what the likelihood has above an estimate of the entropy.
    """

    likelihood: float
    standard_error: float
    cross_entropy: float
    entropy: float
    kl: float
    how: str
    n_targets: int


def measure_likelihood(model: "HookedTransformer", data: MarkovSource | TextWindows, *, size: int = 32) -> Likelihood:
    """How far is a model from the source of its data, in nats a token?

    >>> from hooklens.data.markov_chains import markov_source
    >>> from hooklens.testing import tiny_model
    >>> measured = measure_likelihood(tiny_model(d_vocab=5), markov_source(5, window=8))
    >>> abs(measured.cross_entropy - measured.entropy - measured.kl) < 1e-9
    True

    Maximising the likelihood is minimising the cross-entropy, and since the entropy of the data does not depend on the
    model, it is minimising the KL divergence from the source. For a Markov source all three are computed; for text the
    entropy is estimated from above, by what lzma needs for the held-out tokens.

    Reference: Cover and Thomas (2006), "Elements of information theory", theorem 5.4.3.
    """
    batches = [batch.to(model.device) for batch in data.held_out(size)]
    with torch.no_grad():
        log_probs = [_log_probs(model, batch) for batch in batches]
    losses = torch.cat(
        [
            -q.gather(-1, batch.targets[..., None])[..., 0][batch.counts]
            for q, batch in zip(log_probs, batches, strict=True)
        ]
    )
    mean, error = float(losses.mean()), float(losses.std() / len(losses) ** 0.5)
    if isinstance(data, MarkovSource):
        rows = torch.cat([data.transitions[batch.inputs.cpu()].flatten(0, 1) for batch in batches])
        predicted = torch.cat([q.cpu().flatten(0, 1) for q in log_probs])
        cross = -(rows * predicted).sum(-1)
        entropy = -torch.special.xlogy(rows, rows).sum(-1)
        return Likelihood(
            likelihood=mean,
            standard_error=error,
            cross_entropy=float(cross.mean()),
            entropy=float(entropy.mean()),
            kl=float(kl_divergence(rows.log(), predicted).mean()),
            how="the source's own transition probabilities",
            n_targets=len(losses),
        )
    bound = compressed_nats(data)
    return Likelihood(
        likelihood=mean,
        standard_error=error,
        cross_entropy=mean,
        entropy=bound,
        kl=mean - bound,
        how="an upper bound of the entropy: lzma on the held-out text",
        n_targets=len(losses),
    )


def compressed_nats(data: TextWindows) -> float:
    """What lzma needs for the held-out tokens once it has seen the training tokens, in nats a token: an upper bound.

    The compressed size of the whole text minus that of its training part.
    """
    tokens: Any = data.tokens
    whole, part = (len(lzma.compress(bytes(tokens[:n].tobytes()))) for n in (len(tokens), data.split_at))
    bits = 8 * (whole - part)
    return bits * float(torch.log(torch.tensor(2.0))) / (len(tokens) - data.split_at)


def _log_probs(model: "HookedTransformer", batch: Batch) -> Float[Tensor, "batch pos d_vocab"]:
    return widened(model(batch.inputs)).double().log_softmax(-1)
