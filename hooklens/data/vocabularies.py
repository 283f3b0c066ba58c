"""Vocabularies of one's own: characters, words, bytes, and byte pairs learned with the tokenizers package."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from hooklens.core.arguments import whole
from hooklens.core.errors import ArgumentError, InputError
from hooklens.pretrained.tokenizer import Tokenizer

_N_BYTES = 256
_CHARACTER = r"[\s\S]"
_SPACED = r"\S+"


@dataclass(frozen=True, eq=False)
class WordTokenizer(Tokenizer):
    """A tokenizer that knows some words only, and says which one of a text it does not know."""

    pattern: str = _CHARACTER

    @cached_property
    def _ids(self) -> dict[str, int]:
        return self.backend.get_vocab()

    def encode(self, text: str) -> list[int]:
        """The ids of the words of a text."""
        words = re.findall(self.pattern, text) if isinstance(text, str) else super().encode(text)
        try:
            return [self._ids[word] for word in words]
        except KeyError as error:
            raise self._unreadable(text, error) from None


def word_tokenizer(words: Sequence[str], pattern: str = _CHARACTER) -> WordTokenizer:
    """One token for each of the given words; `pattern` is the regular expression of a word (default: one character).

    >>> word_tokenizer(["a", "b", "="]).encode("a=b")
    [0, 2, 1]
    >>> word_tokenizer(["a", "b", "="]).encode("a=c")
    Traceback (most recent call last):
    hooklens.core.errors.InputError: the text holds 'c', which is none of the 3 tokens of this vocabulary ...
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=""))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    return WordTokenizer(backend, pattern=pattern)


def spaced_tokenizer(words: Sequence[str]) -> WordTokenizer:
    """One token for each of the given words, which are written with spaces between, such as numbers.

    >>> numbers = spaced_tokenizer(["0", "1", "2", "="])
    >>> numbers.encode("1 2 ="), numbers.to_string([1, 2, 3])
    ([1, 2, 3], '1 2 =')
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=""))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # without a decoder, tokens are joined by spaces
    return WordTokenizer(backend, pattern=_SPACED)


def character_tokenizer(characters: Sequence[str]) -> WordTokenizer:
    """One token for each of the given characters.

    >>> character_tokenizer("abc").to_string(character_tokenizer("abc").to_tokens("cab"))
    ['cab']
    """
    if not characters:
        raise InputError("a vocabulary of characters needs at least one; the text is empty")
    return word_tokenizer(list(characters))


def byte_tokenizer() -> Tokenizer:
    """One token for each byte of UTF-8.

    >>> byte_tokenizer().vocab_size, len(byte_tokenizer().encode("é"))
    (256, 2)
    """
    return byte_pair_tokenizer([], _N_BYTES)


def byte_pair_tokenizer(texts: Iterable[str], d_vocab: int) -> Tokenizer:
    """The 256 bytes and the pairs that are merged most often in the texts, `d_vocab` tokens in all.

    >>> tokenizer = byte_pair_tokenizer(["low lower lowest"], 260)
    >>> tokenizer.vocab_size, tokenizer.to_str_tokens("low")
    (260, ['low'])

    A short text may not have enough pairs; the vocabulary is smaller then. No merge crosses a space.

    Reference: Sennrich et al. (2016), "Neural machine translation of rare words with subword units", section 3.2.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if whole("d_vocab", d_vocab) < _N_BYTES:
        raise ArgumentError(
            "{d_vocab} is at least {0} for byte pairs, one token for each byte and one for each merge; got {1}",
            *(_N_BYTES, d_vocab),
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
