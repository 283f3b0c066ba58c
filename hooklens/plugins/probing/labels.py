"""Ready-made labels: balanced tasks from fixed words and numbers, with the entities that folds keep apart.

Each task is read at the last token of its prompts, and that token alone carries no information about the label: what a
probe finds there was moved there by the model. Words are English.
"""

import random
import re
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import InputError
from hooklens.data.demo_prompts import random_vectors
from hooklens.data.prompts import reads_vectors
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.probing.task import ProbeTask, read_task
from hooklens.pretrained.tokenizer import Tokenizer

Reader = HookedTransformer | Tokenizer

_NOUNS = (
    "cat dog bird boy girl friend teacher student doctor farmer king queen brother sister author actor artist "
    "lawyer soldier player driver singer manager writer horse car tree door letter table boat picture"
)
BETWEEN = ("near", "behind", "beside")
_NOUN_OR_VERB = (
    "walk talk run play work help visit answer look watch fight dance love hope change plan report study call "
    "march paint dream rest cook"
)
#: (noun frame, verb frame): the same words in different order.
FRAMES = tuple(
    (f"{who} {place} to the", f"{who} the {place} to")
    for who, place in product(("She was", "They were"), ("next", "first", "last", "closest"))
)
_POSITIVE = (
    "good great wonderful excellent amazing lovely beautiful perfect fantastic brilliant delightful superb nice "
    "charming pleasant impressive"
)
_NEGATIVE = (
    "bad terrible awful horrible poor ugly boring dreadful disappointing stupid annoying weak nasty unpleasant "
    "dull pathetic"
)
THINGS = ("movie", "book", "meal", "song")
NOUNS, NOUN_OR_VERB, POSITIVE, NEGATIVE = (tuple(w.split(" ")) for w in (_NOUNS, _NOUN_OR_VERB, _POSITIVE, _NEGATIVE))
_VOWEL_WORDS = 120
_SHORTEST = 4  # letters: shorter tokens are often pieces of words


class _Row(NamedTuple):
    text: str
    label: int
    entities: tuple[str, ...]


def next_vowel(reader: Reader, *, seed: int = 0) -> ProbeTask:
    """Does the next token begin with a vowel? Two words alternate, " apple river apple", and the other one comes next.

    The words are tokens of the vocabulary. Four words, two of each kind, make eight prompts in which every word is
    followed equally often by either kind, so the last token carries no information.
    """
    ids, label = vowel_tokens(reader, _VOWEL_WORDS, seed=seed)
    words = _tokenizer(reader).to_str_tokens(ids)
    pairs = []
    for kind in (0, 1):
        of_kind = [word for word, starts_so in zip(words, label.tolist(), strict=True) if starts_so == kind]
        random.Random(seed).shuffle(of_kind)
        pairs.append(zip(of_kind[::2], of_kind[1::2], strict=True))
    rows = []
    for (c1, c2), (v1, v2) in zip(*pairs, strict=True):
        # each word is followed once by a vowel word and once by a consonant word, and follows each equally often
        for a, b in ((v1, v2), (v2, v1), (c1, c2), (c2, c1), (v1, c1), (c1, v1), (v2, c2), (c2, v2)):
            rows.append(_Row(a + b + a + b + a, int(b in (v1, v2)), (a, b)))
    return _task(reader, "next token begins with a vowel", ["consonant", "vowel"], rows)


def sum_over_50(reader: Reader, *, seed: int = 0) -> ProbeTask:
    """Is the sum more than 50? "23 + 41 =" with operands up to 50, read at the equals sign.

    The operands come in sets of four, two up to 25 and two above. Sets share no operands, so a probe that memorises
    operands is tested on others. Within a set both answers are equally frequent.
    """
    draw = random.Random(seed)
    low, high = draw.sample(range(1, 26), 24), draw.sample(range(26, 51), 24)
    rows = []
    for i in range(0, 24, 2):
        numbers = (*low[i : i + 2], *high[i : i + 2])
        sums = [(a, b) for a, b in product(numbers, repeat=2)]
        over, under = [p for p in sums if sum(p) > 50], [p for p in sums if sum(p) <= 50]
        n = min(len(over), len(under))
        for a, b in sorted(draw.sample(over, n) + draw.sample(under, n)):
            rows.append(_Row(f"{a} + {b} =", int(a + b > 50), (str(a), str(b))))
    return _task(reader, "sum is more than 50", ["at most 50", "more than 50"], rows)


def subject_number(reader: Reader, *, seed: int = 0) -> ProbeTask:
    """Is the subject singular or plural? "The cats near the tree", read at the second noun, balanced over its number.

    Two nouns make all eight combinations of order and number, and no other prompt uses either of them.
    """
    draw = random.Random(seed)
    nouns = draw.sample(NOUNS, len(NOUNS))
    rows = []
    for i in range(0, len(nouns), 2):
        for between, (a, b) in product(BETWEEN, (nouns[i : i + 2], nouns[i + 1 : i - 1 if i else None : -1])):
            for many, others in product((0, 1), repeat=2):
                rows.append(_Row(f"The {a}{'s' * many} {between} the {b}{'s' * others}", many, (a, b)))
    return _task(reader, "number of the subject", ["singular", "plural"], rows)


def part_of_speech(reader: Reader, *, seed: int = 0) -> ProbeTask:
    """Is the last word a noun or a verb? "She was next to the walk" or "She was the next to walk": only order differs.

    The words can be both. Each occurs in every frame, so the word alone carries no information. A noun frame has the
    same words as its verb frame, so the mean embedding carries none either. Folds keep words apart.
    """
    tokenizer = _tokenizer(reader)
    words = [word for word in NOUN_OR_VERB if tokenizer.find_token(f" {word}") is not None]
    if len(words) < 8:
        raise InputError(
            f"this task needs 8 words that are one token with a leading space, and this tokenizer has {len(words)} "
            f"(' {NOUN_OR_VERB[0]}' becomes {tokenizer.to_str_tokens(f' {NOUN_OR_VERB[0]}')}); use your own prompts "
            "with read_task"
        )
    frames = [(frame, label) for pair in FRAMES for label, frame in enumerate(pair)]
    rows = [_Row(f"{frame} {word}", label, (word,)) for word, (frame, label) in product(words, frames)]
    random.Random(seed).shuffle(rows)
    return _task(reader, "part of speech", ["noun", "verb"], rows)


def sentiment(reader: Reader, *, seed: int = 0) -> ProbeTask:
    """Is the verdict good or bad? "The movie was not terrible. Overall, it was", with half of them negated.

    Every adjective occurs with and without " not", so neither the adjective nor the negation alone decides. Folds keep
    adjectives apart; every judged thing occurs with all adjectives.
    """
    rows = []
    for words, good in ((POSITIVE, 1), (NEGATIVE, 0)):
        for word, thing, negated in product(words, THINGS, (0, 1)):
            text = f"The {thing} was {'not ' * negated}{word}. Overall, I thought it was"
            rows.append(_Row(text, good ^ negated, (word,)))
    random.Random(seed).shuffle(rows)
    return _task(reader, "sentiment", ["negative", "positive"], rows)


def odd_first(model: HookedTransformer, n: int = 40, *, seed: int = 0) -> ProbeTask:
    """Is the first token's number odd? Random prompts of at most three tokens, read at the last; no tokenizer.

    For a model that reads vectors: is the first number of the first vector above 0?
    """
    width, d_vocab = min(3, model.cfg.n_ctx), model.cfg.d_vocab
    if reads_vectors(model):
        vectors = random_vectors(model, n, width, seed=seed)
        return read_task(model, vectors, (vectors[:, 0, 0] > 0).tolist(), name="first number is positive")
    tokens = torch.randint(d_vocab, (n, width), generator=seeded(seed))
    return read_task(model, tokens, [int(row[0]) % 2 for row in tokens], name="first token is odd")


#: The tasks by name.
TASKS: dict[str, Any] = {
    task.__name__: task for task in (next_vowel, sum_over_50, subject_number, part_of_speech, sentiment)
}


def vowel_tokens(
    reader: Reader, n: int = 400, *, shortest: int = _SHORTEST, seed: int = 0
) -> tuple[Int[Tensor, "token"], Int[Tensor, "token"]]:
    """Choose `n` tokens that are a space and lower-case letters, half of them beginning with a vowel.

    >>> from hooklens.pretrained.tokenizer import tiny_tokenizer
    >>> tokenizer = tiny_tokenizer("Ġa Ġan Ġthe Ġof Ġto")
    >>> ids, label = vowel_tokens(tokenizer, 4, shortest=1)
    >>> sorted(zip(tokenizer.to_str_tokens(ids), label.tolist()))
    [(' a', 1), (' an', 1), (' th', 0), (' to', 0)]
    """
    tokenizer = _tokenizer(reader)
    kinds: tuple[list[int], list[int]] = ([], [])
    for i, text in enumerate(tokenizer.to_str_tokens(torch.arange(tokenizer.vocab_size))):
        if re.fullmatch(" [a-z]+", text) and len(text) > shortest:
            kinds[text[1] in "aeiou"].append(i)
    half = n // 2
    if min(map(len, kinds)) < half or half < 1:
        raise InputError(
            f"{n} tokens of a space and a word are needed, half of them beginning with a vowel; this tokenizer "
            f"has {len(kinds[1])} with a vowel and {len(kinds[0])} without; use your own prompts"
        )
    draw = random.Random(seed)
    chosen = [(i, label) for label in (0, 1) for i in sorted(draw.sample(kinds[label], half))]
    ids, labels = zip(*chosen, strict=True)
    return torch.tensor(ids), torch.tensor(labels)


def _task(reader: Reader, name: str, classes: list[str], rows: Sequence[_Row]) -> ProbeTask:
    tokenizer = _tokenizer(reader)
    tokens = [tokenizer.to_tokens(row.text)[0] for row in rows]
    for row, ids in zip(rows, tokens, strict=True):
        if tokenizer.unk_id is not None and tokenizer.unk_id in ids.tolist():
            raise InputError(f"this tokenizer does not know every word of {row.text!r}; use your own prompts")
    return ProbeTask(
        name=name,
        tokens=tokens,
        prompt=torch.arange(len(rows)),
        pos=torch.tensor([len(ids) - 1 for ids in tokens]),
        label=torch.tensor([row.label for row in rows]),
        classes=classes,
        entities=[list(row.entities) for row in rows],
        texts=[row.text for row in rows],
    )


def _tokenizer(reader: Any) -> Tokenizer:
    tokenizer = getattr(reader, "tokenizer", reader)
    if tokenizer is None:
        raise InputError(
            "the named labels need words, and this model has no tokenizer; use read_task with token ids or vectors"
        )
    return tokenizer
