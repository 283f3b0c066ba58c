"""Dropout as a part of the model, with masks that the training loop makes a function of seed and step."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class _Masks:
    """The generator of a pass, and which rows of the whole batch the pass holds."""

    generator: torch.Generator
    first_row: int
    n_rows: int


_masks: ContextVar[_Masks | None] = ContextVar("hooklens_dropout_masks", default=None)


class Dropout(nn.Dropout):
    """Sets entries to 0 with probability `p` while the model trains, and divides the others by 1 - p.

    >>> layer = Dropout(0.5)
    >>> with dropout_masks(torch.Generator().manual_seed(0)):
    ...     layer(torch.ones(1, 4))
    tensor([[0., 2., 0., 0.]])
    >>> layer.eval()(torch.ones(1, 4))
    tensor([[1., 1., 1., 1.]])

    Reference: Srivastava et al. (2014), "Dropout", section 4, with the division at training time.
    """

    @property
    def active(self) -> bool:
        """Whether a pass changes anything."""
        return self.training and self.p > 0

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        if not self.active:
            return x
        masks = _masks.get()
        if masks is None:
            return super().forward(x)
        shape = (masks.n_rows or len(x), *x.shape[1:])
        drawn = torch.rand(shape, generator=masks.generator, device=x.device, dtype=torch.float32)
        kept = drawn[masks.first_row : masks.first_row + len(x)] >= self.p
        return x * kept / (1 - self.p)


@contextmanager
def dropout_masks(generator: torch.Generator, *, first_row: int = 0, n_rows: int = 0) -> Iterator[None]:
    """A `with` block whose masks come from a generator on the model's device instead of torch's global one.

    A pass over some rows of a batch of `n_rows` draws the masks of the whole batch and uses those of its own rows, so
    that a batch has the same masks however it is split over passes or processes.
    """
    token = _masks.set(_Masks(generator, first_row, n_rows))
    try:
        yield
    finally:
        _masks.reset(token)
