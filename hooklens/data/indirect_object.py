"""Indirect objects: "When Mary and John went to the store, John gave a drink to", and its mirror image."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Union

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.errors import ArgumentError, InputError
from hooklens.results.result import Result
from hooklens.results.table import Table

if TYPE_CHECKING:
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


@dataclass(frozen=True, eq=False)
class IOIPairs(Result):
    """Prompt pairs of one length: in the clean one the subject is named again, in the corrupted one the other name is.

    The answer to the clean prompt is the indirect object (`answer`), to the corrupted one the subject (`wrong_answer`).
    `order` says which name comes first: ABBA the indirect object, BABA the subject. Positions are token positions in
    the clean prompt: of the indirect object, of the subject's first and second mention, and of the last token. Pairs of
    one `group` share names and sentence, so they are not independent: intervals should resample groups.
    """

    clean: list[str]
    corrupted: list[str]
    clean_tokens: Int[Tensor, "pair pos"]
    corrupted_tokens: Int[Tensor, "pair pos"]
    answer: list[str]
    wrong_answer: list[str]
    answer_tokens: Int[Tensor, "pair"]
    wrong_answer_tokens: Int[Tensor, "pair"]
    io: Int[Tensor, "pair"]
    s1: Int[Tensor, "pair"]
    s2: Int[Tensor, "pair"]
    end: Int[Tensor, "pair"]
    order: list[str]
    template: list[str]
    group: Int[Tensor, "pair"]

    def __len__(self) -> int:
        return len(self.clean)

    def table(self, n: int | None = 8) -> Table:
        """One row a pair."""
        columns = (self.clean, self.answer, self.wrong_answer, self.order)
        return Table(("clean", "answer", "wrong answer", "order"), list(zip(*columns, strict=True))).head(n)


def ioi(model_or_tokenizer: Union["HookedTransformer", "Tokenizer"], n: int = 64, *, seed: int = 0) -> IOIPairs:
    """`n` indirect-object pairs in which nothing but the grammar tells the answer.

    Two names and one sentence make four pairs: each name once the indirect object and once the subject, each once first
    and once second. So over all pairs every name is as often indirect object as subject, in each order, and knowing the
    name, the order or the sentence helps nobody. Names are single tokens with their space; all prompts have the same
    number of tokens (sentences of another length in this tokenizer are left out).

    >>> from hooklens.pretrained.tokenizer import tiny_tokenizer
    >>> tokenizer = tiny_tokenizer(" ".join(f"Ġ{name}" for name in NAMES))
    >>> pairs = ioi(tokenizer, 8)
    >>> sorted(set(pairs.order)), len(set(pairs.answer)), len(pairs)
    (['ABBA', 'BABA'], 4, 8)

    Reference: Wang et al. (2022), "Interpretability in the Wild", section 2 and appendix E.
    """
    tokenizer: Any = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    if tokenizer is None:
        raise InputError("prompt pairs are made of words, and this model has no tokenizer; load it with tokenizer=")
    check_n_pairs(n)
    names = _single_token_names(tokenizer)
    draw = random.Random(seed)
    couples, frames = _couples(names, n // 4, draw), _frames(tokenizer, names, n // 4, draw)
    rows = [row for couple, frame in zip(couples, frames, strict=True) for row in _four(couple, *frame)]
    return _pairs(tokenizer, rows, getattr(model_or_tokenizer, "device", "cpu"))


def check_n_pairs(n: int, name: str = "n") -> None:
    """Two names make four pairs; `name` is that of the argument."""
    if n < 4 or n % 4:
        near = " or ".join(str(k) for k in sorted({max(4, n - n % 4), max(4, n + -n % 4)}))
        raise ArgumentError(
            f"{{{name}}} is the number of prompt pairs, a multiple of 4: two names make four (each is indirect object "
            "and subject, first and second); got {0}; use {1}",
            n,
            near,
        )


def _single_token_names(tokenizer: "Tokenizer") -> list[str]:
    names = [f" {name}" for name in NAMES if tokenizer.find_token(f" {name}") is not None]
    if len(names) < 2:
        raise InputError(
            f"pairs need two names that are one token each with their space; of {len(NAMES)} common English ones this "
            f"tokenizer has {len(names)} (' Mary' becomes {tokenizer.to_str_tokens(' Mary')}); patch your "
            "own prompts instead"
        )
    return names


def _couples(names: list[str], count: int, draw: random.Random) -> list[tuple[str, str]]:
    """Two names each; every name is used once before any is used again."""
    couples: list[tuple[str, str]] = []
    while len(couples) < count:
        shuffled = draw.sample(names, len(names))
        couples += zip(shuffled[::2], shuffled[1::2], strict=False)
    return couples[:count]


def _frames(tokenizer: "Tokenizer", names: list[str], count: int, draw: random.Random) -> list[tuple[str, str]]:
    """(sentence, template) of one length in tokens: the length that most templates have, then most sentences."""
    found: dict[int, dict[str, list[str]]] = {}
    for template, place, thing in product(TEMPLATES, PLACES, OBJECTS):
        frame = template.replace("{place}", place).replace("{object}", thing)
        length = len(tokenizer.encode(frame.format(first=names[0], second=names[1], subject=names[0])))
        found.setdefault(length, {}).setdefault(template, []).append(frame)
    counts = Counter({length: len(by) * 10_000 + sum(map(len, by.values())) for length, by in found.items()})
    usable = found[counts.most_common(1)[0][0]]
    order = draw.sample(sorted(usable), len(usable))
    templates = [order[i % len(order)] for i in range(count)]
    return [(draw.choice(usable[template]), template) for template in templates]


def _four(couple: tuple[str, str], frame: str, template: str) -> Iterator[tuple[str, str, str, str, str, str]]:
    """(clean, corrupted, answer, wrong answer, order, template) of two names in every role."""
    for (io, subject), order in product((couple, couple[::-1]), _ORDERS):
        first, second = (io, subject) if order == "ABBA" else (subject, io)
        clean, corrupted = (frame.format(first=first, second=second, subject=again) for again in (subject, io))
        yield clean, corrupted, io, subject, order, template


def _pairs(tokenizer: "Tokenizer", rows: list, device: torch.device | str) -> IOIPairs:
    clean, corrupted, answer, wrong, order, template = (list(column) for column in zip(*rows, strict=True))
    a, b = (torch.stack([tokenizer.to_tokens(text)[0] for text in texts]).to(device) for texts in (clean, corrupted))
    right, other = (torch.tensor(list(map(tokenizer.to_single_token, names))).to(device) for names in (answer, wrong))
    # the indirect object is named once in the clean prompt, the subject twice: the first and the last time
    is_subject = (a == other[:, None]).long()
    s1, s2 = is_subject.argmax(1), a.shape[1] - 1 - is_subject.flip(1).argmax(1)
    io = (a == right[:, None]).long().argmax(1)
    end = torch.full_like(io, a.shape[1] - 1)
    group = torch.arange(len(rows) // 4).repeat_interleave(4).to(device)
    return IOIPairs(
        clean=clean,
        corrupted=corrupted,
        clean_tokens=a,
        corrupted_tokens=b,
        answer=answer,
        wrong_answer=wrong,
        answer_tokens=right,
        wrong_answer_tokens=other,
        io=io,
        s1=s1,
        s2=s2,
        end=end,
        order=order,
        template=template,
        group=group,
    )
