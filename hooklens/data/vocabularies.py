"""Vocabularies of one's own: characters, bytes, and byte pairs learned from a text with the tokenizers package."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from hooklens.core.arguments import whole
from hooklens.core.errors import InputError

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer

_N_BYTES = 256


def word_tokenizer(words: Sequence[str], *, split: str = r"(?m:.)") -> "Tokenizer":
    """One token for each of the given words; `split` is the pattern of a word in a text (default: one character).

    >>> word_tokenizer(["a", "b", "="]).encode("a=b")
    [0, 2, 1]
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    from hooklens.pretrained.tokenizer import Tokenizer

    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="\x00"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(split), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


def character_tokenizer(characters: Sequence[str]) -> "Tokenizer":
    """One token for each of the given characters.

    >>> character_tokenizer("abc").to_string(character_tokenizer("abc").to_tokens("cab"))
    ['cab']
    """
    if not characters:
        raise InputError("a vocabulary of characters needs at least one; the text is empty")
    return word_tokenizer(list(characters))


def byte_tokenizer() -> "Tokenizer":
    """One token for each byte of UTF-8."""
    return byte_pair_tokenizer([], _N_BYTES)


def byte_pair_tokenizer(texts: Iterable[str], d_vocab: int) -> "Tokenizer":
    """The 256 bytes and the pairs that are merged most often in the texts, `d_vocab` tokens in all.

    >>> tokenizer = byte_pair_tokenizer(["low lower lowest"], 260)
    >>> tokenizer.vocab_size, tokenizer.to_str_tokens("low")
    (260, ['low'])

    Reference: Sennrich et al. (2016), "Neural machine translation of rare words with subword units", section 3.2.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from hooklens.pretrained.tokenizer import Tokenizer

    whole("d_vocab", d_vocab, _N_BYTES)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
