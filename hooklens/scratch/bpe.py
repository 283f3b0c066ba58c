"""A byte-pair tokenizer in about sixty lines: where do the tokens of a vocabulary come from?"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from hooklens.core.arguments import whole
from hooklens.core.errors import InputError, WrongType
from hooklens.pretrained.byte_letters import byte_values
from hooklens.scratch.word_pattern import words

Pair = tuple[bytes, bytes]
_BYTES = [bytes([byte]) for byte in byte_values().values()]  # GPT-2's order: printable bytes first


@dataclass(frozen=True)
class BytePairs:
    """The 256 bytes, and one more token for each merge of two tokens.

    >>> tokenizer = train_byte_pairs(["low lower lowest"], 260)
    >>> [tokenizer.vocabulary[token] for token in tokenizer.encode("slow lowest")]
    [b's', b'low', b' lowe', b's', b't']
    """

    merges: tuple[Pair, ...]

    @cached_property
    def vocabulary(self) -> list[bytes]:
        """The bytes that each token stands for."""
        return list(dict.fromkeys([*_BYTES, *(first + second for first, second in self.merges)]))

    @cached_property
    def _number(self) -> dict[bytes, int]:
        return {piece: token for token, piece in enumerate(self.vocabulary)}

    @cached_property
    def _rank(self) -> dict[Pair, int]:
        return {pair: rank for rank, pair in enumerate(self.merges)}

    def encode(self, text: str) -> list[int]:
        """The tokens of a text: in each word, the merge that was learned first is applied first, until none applies."""
        return [self._number[piece] for word in words(text) for piece in self._pieces(word)]

    def _pieces(self, word: str) -> list[bytes]:
        pieces, never = _bytes(word), len(self.merges)
        while pairs := list(pairwise(pieces)):
            best = min(pairs, key=lambda pair: self._rank.get(pair, never))
            if best not in self._rank:
                break
            pieces = merged(pieces, best)
        return pieces

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some tokens. Bytes that are not UTF-8 become the replacement character."""
        pieces, tokens = self.vocabulary, list(tokens)
        if unknown := [token for token in tokens if not 0 <= token < len(pieces)]:
            raise InputError(f"tokens are 0 to {len(pieces) - 1}, got {unknown[0]}")
        return b"".join(pieces[token] for token in tokens).decode(errors="replace")


def train_byte_pairs(texts: Iterable[str], d_vocab: int) -> BytePairs:
    """Merge the most frequent pair of neighbouring tokens, again and again; no merge crosses a word.

    Of equally frequent pairs, the one with the smaller token numbers is merged. Training ends early if every word is
    one token.

    Reference: Sennrich et al. (2016), "Neural machine translation of rare words with subword units", algorithm 1.
    """
    if isinstance(texts, str):
        raise WrongType("texts is a list of texts, got one text, whose characters would be read one by one; use [text]")
    whole("d_vocab", d_vocab, len(_BYTES))
    counts = Counter(word for text in texts for word in words(text))
    if not counts:
        raise InputError("a byte-pair vocabulary is learned from text, and there is none; give at least one character")
    split = {word: _bytes(word) for word in counts}
    number, merges = {piece: token for token, piece in enumerate(_BYTES)}, []
    while len(number) < d_vocab:
        pairs: Counter[Pair] = Counter()
        for word, pieces in split.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], number[pair[0]], number[pair[1]]))
        split = {word: merged(pieces, best) for word, pieces in split.items()}
        merges.append(best)
        number.setdefault(best[0] + best[1], len(number))
    return BytePairs(tuple(merges))


def merged(pieces: list[bytes], pair: Pair) -> list[bytes]:
    """The pieces with every occurrence of a pair joined, from left to right.

    >>> merged([b"a", b"a", b"a"], (b"a", b"a"))
    [b'aa', b'a']
    """
    out: list[bytes] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def _bytes(word: str) -> list[bytes]:
    return [bytes([byte]) for byte in word.encode()]
