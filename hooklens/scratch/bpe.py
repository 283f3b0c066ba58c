"""A byte-pair tokenizer in about sixty lines: how do the pieces of a vocabulary come about?"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class BytePairs:
    """The 256 bytes, and one more token for each merge of two.

    >>> tokenizer = train_byte_pairs(["low lower lowest"], 258)
    >>> [tokenizer.piece(token) for token in tokenizer.encode("low")]
    [b'low']
    """

    merges: tuple[Pair, ...]

    def encode(self, word: str) -> list[int]:
        """The tokens of a word: the earliest learned merge is applied first, everywhere, until none applies."""
        rank = {pair: i for i, pair in enumerate(self.merges)}
        tokens = list(word.encode())
        while len(tokens) > 1:
            best = min(zip(tokens, tokens[1:], strict=False), key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            tokens = merged(tokens, best, 256 + rank[best])
        return tokens

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        if token < 256:
            return bytes([token])
        first, second = self.merges[token - 256]
        return self.piece(first) + self.piece(second)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some tokens."""
        return b"".join(map(self.piece, tokens)).decode(errors="replace")


def train_byte_pairs(words: Iterable[str], d_vocab: int) -> BytePairs:
    """Merge the most frequent pair of neighbouring tokens, again and again; no merge crosses a word.

    Of equally frequent pairs the one with the smaller token numbers is merged.

    Reference: Sennrich et al. (2016), "Neural machine translation of rare words with subword units", algorithm 1.
    """
    counts = Counter(words)
    split = {word: list(word.encode()) for word in counts}
    merges: list[Pair] = []
    while len(merges) < d_vocab - 256:
        pairs: Counter[Pair] = Counter()
        for word, tokens in split.items():
            for pair in zip(tokens, tokens[1:], strict=False):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        split = {word: merged(tokens, best, 256 + len(merges)) for word, tokens in split.items()}
        merges.append(best)
    return BytePairs(tuple(merges))


def merged(tokens: list[int], pair: Pair, token: int) -> list[int]:
    """The tokens with every occurrence of a pair replaced by one token, from left to right."""
    out: list[int] = []
    for following in tokens:
        if out and (out[-1], following) == pair:
            out[-1] = token
        else:
            out.append(following)
    return out
