"""Gendered pronouns: "So Mary is a really great friend, isn't" is followed by " she"."""

from collections import Counter
from itertools import product
from typing import TYPE_CHECKING, Any, Union

import torch

from hooklens.core.arguments import python_draws, whole
from hooklens.core.errors import ArgumentError, InputError, WrongType
from hooklens.data.prompt_pairs import PromptPairs

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer
    from hooklens.pretrained.tokenizer import Tokenizer

WOMEN = (
    "Mary",
    "Anna",
    "Sarah",
    "Lisa",
    "Kate",
    "Emma",
    "Alice",
    "Susan",
    "Laura",
    "Emily",
    "Julia",
    "Jane",
    "Helen",
    "Lucy",
    "Maria",
    "Rachel",
    "Grace",
    "Rose",
)
MEN = (
    "John",
    "Tom",
    "James",
    "Paul",
    "David",
    "Mark",
    "Peter",
    "Jack",
    "Bob",
    "Michael",
    "Robert",
    "Daniel",
    "Adam",
    "Simon",
    "Henry",
    "George",
    "William",
    "Frank",
)
TEMPLATES = (
    "So {name} is a really great {role}, isn't",
    "So {name} is such a good {role}, isn't",
    "Well, {name} was a very kind {role}, wasn't",
    "I think {name} is a wonderful {role}, isn't",
)
ROLES = ("friend", "neighbor", "teacher", "student", "doctor", "cook", "singer", "writer", "driver", "artist")


def gendered_pronouns(
    model_or_tokenizer: Union["HookedTransformer", "Tokenizer"], n: int = 64, *, seed: int = 0
) -> PromptPairs:
    """`n` pairs in which only the name tells the pronoun; the corrupted prompt has a name of the other gender.

    A woman, a man and a sentence make two pairs, one each way round, so that each pronoun is as often right and the
    sentence tells nothing. Names are single tokens, and all prompts have one length. The two pairs are one group. The
    metric is the logit difference of the pronouns. Columns: "name", "other_name", "template", "role".

    >>> from hooklens.pretrained.tokenizer import tiny_tokenizer
    >>> tokenizer = tiny_tokenizer(" ".join(f"Ġ{word}" for word in (*WOMEN, *MEN, "he", "she")))
    >>> pairs = gendered_pronouns(tokenizer, 4)
    >>> pairs.answer
    [' she', ' he', ' she', ' he']

    Reference: Mathwin et al. (2023), "Identifying a preliminary circuit for predicting gendered pronouns in GPT-2
    small".
    """
    tokenizer = tokenizer_of(model_or_tokenizer)
    if whole("n", n) < 2 or n % 2:
        raise ArgumentError("{n} is the number of prompt pairs, a multiple of 2 (two names make two); got {0}", n)
    women, men = ([name for name in names if _is_one_token(tokenizer, name)] for names in (WOMEN, MEN))
    pronouns = [word for word in ("she", "he") if _is_one_token(tokenizer, word)]
    if not women or not men or len(pronouns) < 2:
        raise InputError(
            "gendered pronouns need names and pronouns that are single tokens with their space, and this tokenizer has "
            f"{len(women)} of {len(WOMEN)} women's names, {len(men)} of {len(MEN)} men's names, and "
            f"{len(pronouns)} of ' she' and ' he'"
        )
    draw = python_draws(seed)
    frames = _frames_of_one_length(tokenizer, women[0])
    draw.shuffle(frames)
    rows = []
    for i in range(n // 2):
        template, role = frames[i % len(frames)]
        woman, man = draw.choice(women), draw.choice(men)
        rows += [(woman, man, " she", " he", template, role), (man, woman, " he", " she", template, role)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    return PromptPairs(
        [row[4].format(name=row[0], role=row[5]) for row in rows],
        [row[4].format(name=row[1], role=row[5]) for row in rows],
        answer=columns[2],
        wrong_answer=columns[3],
        group=torch.arange(n // 2).repeat_interleave(2),
        columns={"name": columns[0], "other_name": columns[1], "template": columns[4], "role": columns[5]},
    )


def tokenizer_of(model_or_tokenizer: Union["HookedTransformer", "Tokenizer"]) -> "Tokenizer":
    """The tokenizer of a model, or the tokenizer itself."""
    tokenizer: Any = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    if tokenizer is None:
        raise InputError("prompt pairs are made of words, and this model has no tokenizer; load it with tokenizer=")
    if not hasattr(tokenizer, "find_token"):
        raise WrongType(f"prompt pairs are made for a model or a Tokenizer, got {model_or_tokenizer!r:.80}")
    return tokenizer


def _frames_of_one_length(tokenizer: "Tokenizer", name: str) -> list[tuple[str, str]]:
    """Templates and roles that give sentences of one length in tokens, the most common one."""
    frames = list(product(TEMPLATES, ROLES))
    lengths = [len(tokenizer.encode(template.format(name=name, role=role))) for template, role in frames]
    most, _ = Counter(lengths).most_common(1)[0]
    return [frame for frame, length in zip(frames, lengths, strict=True) if length == most]


def _is_one_token(tokenizer: "Tokenizer", word: str) -> bool:
    return tokenizer.find_token(f" {word}") is not None
