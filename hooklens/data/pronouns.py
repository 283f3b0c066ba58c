"""Gendered pronouns: "So Mary is a really great friend, isn't" is followed by " she"."""

import random
from itertools import product
from typing import TYPE_CHECKING, Any, Union

import torch

from hooklens.core.errors import ArgumentError, InputError
from hooklens.data.prompt_pairs import PromptPairs

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer
    from hooklens.pretrained.tokenizer import Tokenizer

WOMEN = [
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
]
MEN = [
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
]
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
    sentence tells nothing. Names are single tokens. The two pairs are one group. Columns: "name", "role", "template".

    >>> from hooklens.pretrained.tokenizer import tiny_tokenizer
    >>> tokenizer = tiny_tokenizer(" ".join(f"Ġ{word}" for word in (*WOMEN, *MEN, "he", "she")))
    >>> pairs = gendered_pronouns(tokenizer, 4)
    >>> pairs.answer
    [' she', ' he', ' she', ' he']

    Reference: Mathwin et al. (2023), "Identifying a preliminary circuit for predicting gendered pronouns in GPT-2 small".
    """
    tokenizer: Any = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    if tokenizer is None:
        raise InputError("prompt pairs are made of words, and this model has no tokenizer; load it with tokenizer=")
    if n < 2 or n % 2:
        raise ArgumentError("{n} is the number of prompt pairs, a multiple of 2 (two names make two); got {0}", n)
    women, men = ([name for name in names if _is_one_token(tokenizer, name)] for names in (WOMEN, MEN))
    if not women or not men or not _is_one_token(tokenizer, "she") or not _is_one_token(tokenizer, "he"):
        raise InputError(
            f"names and pronouns are to be single tokens, and this tokenizer has {len(women)} of {len(WOMEN)} women's and "
            f"{len(men)} of {len(MEN)} men's names"
        )
    draw = random.Random(seed)
    frames = draw.sample(list(product(TEMPLATES, ROLES)), len(TEMPLATES) * len(ROLES))
    clean, corrupted, answer, wrong = [], [], [], []
    columns: dict[str, list[str]] = {"name": [], "role": [], "template": []}
    for i in range(n // 2):
        template, role = frames[i % len(frames)]
        woman, man = draw.choice(women), draw.choice(men)
        for name, other, pronoun in ((woman, man, " she"), (man, woman, " he")):
            clean.append(template.format(name=name, role=role))
            corrupted.append(template.format(name=other, role=role))
            answer.append(pronoun)
            wrong.append(" he" if pronoun == " she" else " she")
            for key, value in (("name", name), ("role", role), ("template", template)):
                columns[key].append(value)
    group = torch.arange(n // 2).repeat_interleave(2)
    return PromptPairs(clean, corrupted, answer=answer, wrong_answer=wrong, group=group, columns=columns)


def _is_one_token(tokenizer: "Tokenizer", word: str) -> bool:
    return tokenizer.find_token(f" {word}") is not None
