"""Is a text fluent? The loss of the unsteered model on it, and how much of it is repeated."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.generation.sampling import Generation
from hooklens.plugins.steering.variants import nats

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

_LOGITS_AT_ONCE = 2**25


def continuation_loss(model: "HookedTransformer", written: Generation) -> Float[Tensor, "text"]:
    """The model's loss on each continuation, in nats per new token, with the hooks that are active now.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model()
    >>> continuation_loss(model, model.generate([[1, 2], [3]], 4)).shape
    torch.Size([2])
    """
    tokens, real = written.padded()
    before = torch.tensor([len(row) for row in written.prompts], device=tokens.device)
    new = torch.tensor([len(row) for row in written.new_tokens], device=tokens.device)
    step = torch.arange(int(new.max()), device=tokens.device)
    at = (before[:, None] + step).clamp_max(tokens.shape[1] - 1)
    found = []
    for rows in torch.arange(len(tokens)).split(max(1, _LOGITS_AT_ONCE // (len(step) * model.cfg.d_vocab_out))):
        read = model(tokens[rows], attention_mask=real[rows], stop_at_layer=model.cfg.n_layers)
        stream = read.as_subclass(torch.Tensor)  # by column: padding of short rows is read too, and not counted below
        each = torch.arange(len(rows))[:, None]
        paid = nats(model.read_out(stream[each, at[rows] - 1]), tokens[rows].gather(1, at[rows]))
        found.append((paid * (step < new[rows, None])).sum(1) / new[rows])
    return torch.cat(found)


def repeated(ids: Int[Tensor, "pos"]) -> float:
    """The share of two-token sequences that occurred earlier in the same text.

    >>> repeated(torch.tensor([1, 2, 1, 2, 1])), repeated(torch.tensor([1, 2, 3]))
    (0.5, 0.0)

    Reference: Li et al. (2016), "A Diversity-Promoting Objective Function", distinct-2 (this is 1 minus it).
    """
    pairs = list(zip(ids.tolist(), ids.tolist()[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
