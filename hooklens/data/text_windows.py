"""Windows of a long text: each token predicts the next; the end of the text is held out."""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.arguments import path_of, seed_number, whole
from hooklens.core.envelope import digest
from hooklens.core.errors import InputError, Unavailable, WrongType, did_you_mean
from hooklens.core.files import reading
from hooklens.data.batches import Batch, TrainingData, drawn_for, next_token_batch, share

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer

_PIECE = 2**17  # characters that are tokenised at a time
_BEFORE_LAST_WORD = re.compile(r"[\s\S]+(?=\s\S)")
_TOKENIZERS = ("characters", "bytes", "byte_pairs")

Chunks = Callable[[], Iterator[str]]


@dataclass(frozen=True, eq=False)
class TextWindows(TrainingData):
    """Windows of `window` + 1 tokens, drawn anywhere in the first `split_at` tokens of a text; the rest is held out.

    `tokens` may be a memory-mapped array, so that a text need not fit in memory. `evaluated` held-out windows at equal
    distances are used by `held_out` (None: all; no token is predicted twice).
    """

    name: str
    tokens: Any = field(repr=False)
    split_at: int
    tokenizer: "Tokenizer" = field(repr=False)
    window: int
    evaluated: int | None = 64
    seed: int = 0

    def __post_init__(self) -> None:
        whole("window", self.window, 1)
        seed_number(self.seed)
        if self.evaluated is not None:
            whole("evaluated", self.evaluated, 1)
        held_out = len(self.tokens) - self.split_at
        if min(self.split_at, held_out) < self.window + 1:
            raise InputError(
                f"{self.name} has {self.split_at:,} training and {held_out:,} held-out tokens; a window of "
                f"{self.window} needs {self.window + 1} in both: give a longer text or a smaller window"
            )

    @property
    def d_vocab(self) -> int:
        """The number of tokens that the tokenizer knows."""
        return self.tokenizer.vocab_size

    @property
    def vocabulary(self) -> list[str]:
        """What each token stands for."""
        return self.tokenizer.to_str_tokens(list(range(self.d_vocab)))

    def windows(self, starts: Int[Tensor, "batch"]) -> Batch:
        """The windows that begin at these tokens."""
        at = starts[:, None].numpy() + np.arange(self.window + 1)
        return next_token_batch(torch.from_numpy(self.tokens[at].astype(np.int64)))

    def batch(self, step: int, size: int) -> Batch:
        """Windows that begin anywhere in the training part, and end in it."""
        n_starts = self.split_at - self.window
        return self.windows(torch.randint(n_starts, (size,), generator=drawn_for(self.seed, step)))

    def held_out(self, size: int) -> Iterator[Batch]:
        """Held-out windows, one behind the other or at equal distances."""
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
            "split_at": self.split_at,
            "window": self.window,
            "evaluated": self.evaluated,
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
    """The windows of a text file; its last characters, a share `held_out` of all, are held out.

    >>> path = Path(tempfile.mkdtemp()) / "abc.txt"
    >>> _ = path.write_text("abcabcabcabc" * 10)
    >>> data = text(path, window=4)
    >>> data.d_vocab, data.batch(0, 2).inputs.shape
    (3, torch.Size([2, 4]))

    `tokenizer` is "characters" (one token for each character of the text), "bytes", "byte_pairs" (a vocabulary of
    `d_vocab` tokens trained on the training part only), or a Tokenizer. The file is read in pieces, cut before words,
    and its tokens are kept in a temporary file that is mapped into memory, so that memory stays bounded.
    """
    path = path_of(source, "source")
    split = TextSplit(path.name, lambda: read_chunks(path), held_out)
    return split.windows(tokenizer, d_vocab, window=window, seed=seed)


class TextSplit:
    """A text that `chunks()` yields from its beginning. It is read once here, for its length and its characters."""

    def __init__(self, name: str, chunks: Chunks, held_out: float):
        self.name, self.chunks = name, chunks
        self.held_out = share("held_out", held_out, "the text, its end")
        self.length, characters = 0, set()
        for chunk in chunks():
            self.length += len(chunk)
            characters |= set(chunk)
        if not self.length:
            raise InputError(f"{name} is empty; give a text with at least one window to train on and one to hold out")
        self.characters = sorted(characters)
        self.at = self.length - round(self.held_out * self.length)

    def windows(self, tokenizer: "str | Tokenizer", d_vocab: int, *, window: int, seed: int) -> TextWindows:
        """The windows of the text in the tokens of that tokenizer, made from its training part if it is a name."""
        whole("window", window, 1)
        seed_number(seed)
        chosen = self._tokenizer(tokenizer, d_vocab)
        tokens, split_at = _token_array(chosen, (self.pieces(0, self.at), self.pieces(self.at, self.length)))
        return TextWindows(self.name, tokens, split_at, chosen, window, seed=seed)

    def pieces(self, start: int, stop: int) -> Iterator[str]:
        """A part of the text, in pieces."""
        return _pieces(_between(self.chunks(), start, stop))

    def _tokenizer(self, tokenizer: "str | Tokenizer", d_vocab: int) -> "Tokenizer":
        from hooklens.data.vocabularies import byte_pair_tokenizer, byte_tokenizer, character_tokenizer

        if tokenizer == "characters":
            return character_tokenizer(self.characters)
        if tokenizer == "bytes":
            return byte_tokenizer()
        if tokenizer == "byte_pairs":
            return byte_pair_tokenizer(self.pieces(0, self.at), d_vocab)
        if isinstance(tokenizer, str):
            raise did_you_mean("tokenizer", tokenizer, _TOKENIZERS)
        if not hasattr(tokenizer, "encode") or not hasattr(tokenizer, "vocab_size"):
            raise WrongType(f"tokenizer is one of {', '.join(_TOKENIZERS)}, or a Tokenizer; got {tokenizer!r:.60}")
        return tokenizer


def read_chunks(path: Path) -> Iterator[str]:
    """The text of a file, in chunks."""
    with reading(path, "a text"), open(path, encoding="utf-8") as file:
        while chunk := file.read(_PIECE):
            yield chunk


def _between(chunks: Iterator[str], start: int, stop: int) -> Iterator[str]:
    """The characters of a text from `start` to `stop`."""
    at = 0
    for chunk in chunks:
        yield chunk[max(0, start - at) : max(0, stop - at)]
        at += len(chunk)
        if at >= stop:
            return


def _pieces(chunks: Iterator[str]) -> Iterator[str]:
    """A text in pieces of at most `_PIECE` characters, each but the last cut before a word and its space.

    Tokenizers that split a text into words with their space, as GPT-2's does, give the pieces the tokens of the whole.
    Of several spaces before a word only the last is the word's.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) > _PIECE:
            before = _BEFORE_LAST_WORD.match(rest, 0, _PIECE)
            at = before.end() if before else _PIECE
            yield rest[:at]
            rest = rest[at:]
    if rest:
        yield rest


def _token_array(tokenizer: "Tokenizer", parts: tuple[Iterator[str], Iterator[str]]) -> tuple[Any, int]:
    """The tokens of both parts, in a temporary file that is mapped into memory and removed with the array; and how
    many the first part has."""
    kind = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    lengths = [0, 0]
    with kept_aside("the tokens"), tempfile.TemporaryFile(prefix="hooklens-tokens-") as file:
        for i, pieces in enumerate(parts):
            for piece in pieces:
                tokens = np.asarray(tokenizer.encode(piece), dtype=kind)
                lengths[i] += len(tokens)
                file.write(tokens.tobytes())
        file.flush()
        if not sum(lengths):
            raise InputError("the text has no tokens; give a text in the words of its tokenizer")
        return np.memmap(file, dtype=kind, mode="r"), lengths[0]


@contextlib.contextmanager
def kept_aside(what: str) -> Iterator[None]:
    """Turn the errors of a temporary file into one that says where it is."""
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"{what} of a text are kept in a temporary file in {tempfile.gettempdir()!r}, which failed "
            f"({error.strerror or error}); free some space, or set TMPDIR to another folder"
        ) from error
