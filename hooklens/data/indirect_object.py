"""Indirect object identification: "When Mary and John went to the store, John gave a drink to"."""

import random
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from hooklens.core.arguments import python_draws
from hooklens.core.errors import ArgumentError, InputError
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.tokenizer import Tokenizer

_NAMES = (
    "Mary John Tom James Anna Paul Sarah David Lisa Mark Kate Peter Emma Jack Alice Bob Susan Michael Laura Robert "
    "Daniel Emily Adam Julia Simon Jane Henry George Helen William Lucy Ben Sam Martin Anne Thomas Maria Rachel Amy "
    "Steve Kevin Chris Alex Grace Rose Jim Joe Frank Andrew Charles"
)
NAMES = tuple(_NAMES.split(" "))
TEMPLATES = (
    "When{first} and{second} went to the {place},{subject} gave a {object} to",
    "When{first} and{second} walked through the {place},{subject} handed a {object} to",
    "While{first} and{second} were at the {place},{subject} passed a {object} to",
    "After{first} and{second} arrived at the {place},{subject} offered a {object} to",
    "Since{first} and{second} lived near the {place},{subject} lent a {object} to",
    "Because{first} and{second} worked at the {place},{subject} brought a {object} to",
    "Once{first} and{second} got to the {place},{subject} gave the {object} to",
    "Before{first} and{second} drove to the {place},{subject} sold a {object} to",
)
PLACES = ("store", "school", "park", "garden", "station", "market", "office", "hospital", "house", "restaurant")
OBJECTS = ("drink", "book", "ring", "gift", "letter", "ball", "key", "ticket", "bag", "flower")
_ORDERS = ("ABBA", "BABA")


def ioi(model_or_tokenizer: HookedTransformer | Tokenizer, n: int = 64, *, seed: int = 0) -> PromptPairs:
    """`n` indirect-object pairs, balanced so that only the grammar determines the answer.

    The clean prompt repeats the subject, the corrupted one the other name. The answer to the clean prompt is the
    indirect object, to the corrupted one the subject (`wrong_answer`).

    Two names and one sentence give four pairs, which are one group: each name is once the indirect object and once the
    subject, in both orders. So the name, the order and the sentence say nothing about the answer. Names are single
    tokens with their space, and all prompts have the same number of tokens (sentences of other lengths are left out).

    Columns: "order" (ABBA: the indirect object comes first, BABA: the subject); "template", the sentence; and positions
    in the clean prompt: "io" (indirect object), "s1" and "s2" (first and second mention of the subject), "end" (last
    token).

    >>> from hooklens.pretrained.tokenizer import tiny_tokenizer
    >>> tokenizer = tiny_tokenizer(" ".join(f"Ġ{name}" for name in NAMES))
    >>> pairs = ioi(tokenizer, 8)
    >>> sorted(set(pairs["order"])), len(set(pairs.answer)), len(pairs)
    (['ABBA', 'BABA'], 4, 8)

    Reference: Wang et al. (2022), "Interpretability in the Wild", section 2 and appendix E.
    """
    tokenizer: Any = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    if tokenizer is None:
        raise InputError("prompt pairs are made of words, and this model has no tokenizer; load it with tokenizer=")
    check_n_pairs(n)
    names = _single_token_names(tokenizer)
    draw = python_draws(seed)
    couples, frames = _couples(names, n // 4, draw), _frames(tokenizer, names, n // 4, draw)
    rows = [row for couple, frame in zip(couples, frames, strict=True) for row in _four(couple, *frame)]
    return _pairs(tokenizer, rows)


def check_n_pairs(n: int, name: str = "n") -> None:
    """Raise unless `n` is a multiple of 4: two names give four pairs. `name` is the argument's."""
    if n < 4 or n % 4:
        near = " or ".join(str(k) for k in sorted({max(4, n - n % 4), max(4, n + -n % 4)}))
        raise ArgumentError(
            f"{{{name}}} is the number of prompt pairs, a multiple of 4: two names give four; got {{0}}; use {{1}}",
            *(n, near),
        )


def _single_token_names(tokenizer: Tokenizer) -> list[str]:
    names = [f" {name}" for name in NAMES if tokenizer.find_token(f" {name}") is not None]
    if len(names) < 2:
        raise InputError(
            f"ioi needs two names that are single tokens with their space; of {len(NAMES)} common English names, this "
            f"tokenizer has {len(names)} (' Mary' becomes {tokenizer.to_str_tokens(' Mary')}); use your own prompts"
        )
    return names


def _couples(names: list[str], count: int, draw: random.Random) -> list[tuple[str, str]]:
    """Pairs of names; every name is used once before any is used again."""
    couples: list[tuple[str, str]] = []
    while len(couples) < count:
        shuffled = draw.sample(names, len(names))
        couples += zip(shuffled[::2], shuffled[1::2], strict=False)
    return couples[:count]


def _frames(tokenizer: Tokenizer, names: list[str], count: int, draw: random.Random) -> list[tuple[str, str]]:
    """(sentence, template) of one length in tokens: the length of most templates, and among these of most sentences."""
    by_length: dict[int, dict[str, list[str]]] = {}
    for template, place, thing in product(TEMPLATES, PLACES, OBJECTS):
        frame = template.replace("{place}", place).replace("{object}", thing)
        length = len(tokenizer.encode(frame.format(first=names[0], second=names[1], subject=names[0])))
        by_length.setdefault(length, {}).setdefault(template, []).append(frame)
    counts = Counter({length: len(by) * 10_000 + sum(map(len, by.values())) for length, by in by_length.items()})
    usable = by_length[counts.most_common(1)[0][0]]
    order = draw.sample(sorted(usable), len(usable))
    templates = [order[i % len(order)] for i in range(count)]
    return [(draw.choice(usable[template]), template) for template in templates]


def _four(couple: tuple[str, str], frame: str, template: str) -> Iterator[tuple[str, str, str, str, str, str]]:
    """(clean, corrupted, answer, wrong answer, order, template), with each name in each role and order."""
    for (io, subject), order in product((couple, couple[::-1]), _ORDERS):
        first, second = (io, subject) if order == "ABBA" else (subject, io)
        clean, corrupted = (frame.format(first=first, second=second, subject=again) for again in (subject, io))
        yield clean, corrupted, io, subject, order, template


def _pairs(tokenizer: Tokenizer, rows: list) -> PromptPairs:
    clean, corrupted, answer, wrong, order, template = (list(column) for column in zip(*rows, strict=True))
    tokens = torch.stack([tokenizer.to_tokens(text)[0] for text in clean])
    indirect, subject = (
        torch.tensor([tokenizer.to_single_token(name) for name in names])[:, None] for names in (answer, wrong)
    )
    # the clean prompt mentions the indirect object once and the subject twice
    is_subject, last = (tokens == subject).long(), tokens.shape[1] - 1
    places = {
        "io": (tokens == indirect).long().argmax(1),
        "s1": is_subject.argmax(1),
        "s2": last - is_subject.flip(1).argmax(1),
        "end": torch.full((len(tokens),), last),
    }
    return PromptPairs(
        clean,
        corrupted,
        answer=answer,
        wrong_answer=wrong,
        group=torch.arange(len(rows) // 4).repeat_interleave(4),
        columns={"order": order, "template": template, **places},
    )
