"""Windows of a long text: each token predicts the next; the end of the text is held out."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.arguments import path_of, seeded, whole
from hooklens.core.envelope import digest
from hooklens.core.errors import InputError, did_you_mean
from hooklens.core.files import reading
from hooklens.data.batches import Batch, TrainingData, next_token_batch

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer

_PIECE = 2**20  # characters that are in memory at a time
_TOKENIZERS = ("characters", "bytes", "byte_pairs")


@dataclass(frozen=True, eq=False)
class TextWindows(TrainingData):
    """Windows of `window` + 1 tokens, drawn anywhere in the first part of a text; the rest is held out.

    `tokens` may be a memory-mapped array, so that a text needs not fit in memory. `evaluated` held-out windows at
    equal distances are used by `held_out` (None: all that do not overlap).
    """

    name: str
    tokens: Any = field(repr=False)
    tokenizer: "Tokenizer" = field(repr=False)
    window: int
    held_out_fraction: float = 0.1
    evaluated: int | None = 64
    seed: int = 0

    def __post_init__(self) -> None:
        whole("window", self.window, 1)
        if not 0 < self.held_out_fraction < 1:
            raise InputError(f"held_out is the share of the text's end, between 0 and 1; got {self.held_out_fraction}")
        shortest = min(self.split_at, len(self.tokens) - self.split_at)
        if shortest < self.window + 1:
            raise InputError(
                f"{self.name} has {self.split_at:,} training and {len(self.tokens) - self.split_at:,} held-out tokens; "
                f"a window needs {self.window + 1} in both: give a longer text or a smaller window"
            )

    @property
    def d_vocab(self) -> int:
        """The number of tokens that the tokenizer knows."""
        return self.tokenizer.vocab_size

    @property
    def split_at(self) -> int:
        """The number of training tokens, which come first."""
        return len(self.tokens) - round(self.held_out_fraction * len(self.tokens))

    def windows(self, starts: Int[Tensor, "window"]) -> Batch:
        """The windows that begin at these tokens."""
        at = starts[:, None].numpy() + np.arange(self.window + 1)
        return next_token_batch(torch.from_numpy(self.tokens[at].astype(np.int64)))

    def batch(self, step: int, size: int) -> Batch:
        """Windows that begin anywhere in the training part."""
        last = self.split_at - self.window
        return self.windows(torch.randint(last, (size,), generator=seeded(self.seed, step, stride=2**32)))

    def held_out(self, size: int) -> Iterator[Batch]:
        """Held-out windows that do not overlap."""
        count = (len(self.tokens) - self.split_at - 1) // self.window
        starts = self.split_at + self.window * torch.arange(count)
        if self.evaluated is not None and self.evaluated < count:
            starts = starts[torch.linspace(0, count - 1, self.evaluated).round().long()]
        for some in starts.split(size):
            yield self.windows(some)

    def with_all_held_out(self) -> "TextWindows":
        """The same data, with every held-out window evaluated."""
        return replace(self, evaluated=None)

    def description(self) -> str:
        """What there is to learn."""
        return f"the next token of {self.name}: {len(self.tokens):,} tokens of a vocabulary of {self.d_vocab:,}"

    def identity(self) -> dict[str, Any]:
        """What identifies the data."""
        content = digest(
            np.ascontiguousarray(piece).view(np.uint8).data for piece in np.array_split(self.tokens, 64) if len(piece)
        )
        return {
            "task": "text",
            "tokens": content,
            "window": self.window,
            "held_out": self.held_out_fraction,
            "seed": self.seed,
        }


def text(
    source: str | os.PathLike,
    *,
    tokenizer: "str | Tokenizer" = "characters",
    window: int = 128,
    held_out: float = 0.1,
    d_vocab: int = 1024,
    seed: int = 0,
) -> TextWindows:
    """The windows of a text file.

    >>> path = Path(tempfile.mkdtemp()) / "abc.txt"
    >>> _ = path.write_text("abcabcabcabc" * 10)
    >>> data = text(path, window=4)
    >>> data.d_vocab, data.batch(0, 2).inputs.shape
    (3, torch.Size([2, 4]))

    `tokenizer` is "characters" (one token for each character that occurs), "bytes", "byte_pairs" (a vocabulary of
    `d_vocab` tokens trained on the first nine tenths of the text), or a Tokenizer. The file is read in pieces and its
    tokens are kept in a temporary file, so that memory stays bounded.
    """
    path = path_of(source, "source")
    with reading(path, "a text"), open(path, encoding="utf-8") as file:
        file.read(1)
    chosen = tokenizer_for(tokenizer, lambda: _pieces(path), d_vocab)
    return TextWindows(path.name, _token_array(chosen, _pieces(path)), chosen, window, held_out, seed=seed)


def tokenizer_for(tokenizer: "str | Tokenizer", pieces: Any, d_vocab: int) -> "Tokenizer":
    """The tokenizer of that name, made for a text that `pieces()` yields."""
    from hooklens.data.vocabularies import byte_pair_tokenizer, byte_tokenizer, character_tokenizer

    if not isinstance(tokenizer, str):
        return tokenizer
    if tokenizer == "characters":
        return character_tokenizer(sorted(set().union(*(set(piece) for piece in pieces()))))
    if tokenizer == "bytes":
        return byte_tokenizer()
    if tokenizer == "byte_pairs":
        return byte_pair_tokenizer(pieces(), d_vocab)
    raise did_you_mean("tokenizer", tokenizer, _TOKENIZERS)


def _pieces(path: Path) -> Iterator[str]:
    """The text of a file, cut at line ends so that no word is split."""
    with reading(path, "a text"), open(path, encoding="utf-8") as file:
        while lines := file.readlines(_PIECE):
            yield "".join(lines)


def _token_array(tokenizer: "Tokenizer", pieces: Iterator[str]) -> Any:
    """The tokens of all pieces, in a temporary file that is mapped into memory and removed with the array."""
    kind = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    with tempfile.TemporaryFile(prefix="hooklens-tokens-") as file:
        for piece in pieces:
            file.write(np.asarray(tokenizer.encode(piece), dtype=kind).tobytes())
        file.flush()
        if not file.tell():
            raise InputError("the text is empty; give a file with text in it")
        return np.memmap(file, dtype=kind, mode="r")
