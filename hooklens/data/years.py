"""Greater-than: "The war lasted from the year 1732 to the year 17" is followed by a number above 32."""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.errors import InputError
from hooklens.core.precision import widened
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.metrics import AtPosition

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer
    from hooklens.pretrained.tokenizer import Tokenizer

EVENTS = [
    "war",
    "siege",
    "strike",
    "drought",
    "famine",
    "voyage",
    "trial",
    "exhibition",
    "campaign",
    "expedition",
    "festival",
    "negotiation",
    "occupation",
    "pilgrimage",
    "plague",
    "quarrel",
    "rebellion",
    "reform",
    "regency",
    "residence",
    "restoration",
    "revolt",
    "search",
    "tour",
    "truce",
]
CENTURIES = range(11, 18)


@dataclass(frozen=True, eq=False)
class SetDiff(AtPosition):
    """The probability of any right answer minus that of any wrong one: between -1 and 1."""

    right: Bool[Tensor, "pair d_vocab"]
    wrong: Bool[Tensor, "pair d_vocab"]

    def on_read(self, logits: Float[Tensor, "row read d_vocab"]) -> Float[Tensor, "row"]:
        probs = widened(logits[:, 0]).softmax(-1)
        weights = self.right.to(probs) - self.wrong.to(probs)
        return (probs * weights).sum(-1)


def greater_than(
    model_or_tokenizer: Union["HookedTransformer", "Tokenizer"], n: int = 64, *, seed: int = 0
) -> PromptPairs:
    """`n` pairs in which the first year bounds the last one; in the corrupted prompt it is the year 01, no bound.

    A tokenizer that has two-digit numbers as tokens gets sets of these: right are those above the year's last two
    digits, wrong all others. A tokenizer of single digits gets digits for the tens: right are those above, wrong those
    below; the year's own is neither.

    Columns: "event", "century", "year" (its last two digits). The metric is the probability of the right set minus that
    of the wrong set. Prompts of one event are a group.

    >>> from hooklens.pretrained.tokenizer import tiny_tokenizer
    >>> pairs = greater_than(tiny_tokenizer(""), 4)
    >>> len(pairs), pairs.clean[0][-2:] == str(pairs["century"][0])
    (4, True)

    Reference: Hanna et al. (2023), "How does GPT-2 compute greater-than?", section 2.
    """
    tokenizer: Any = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    if tokenizer is None:
        raise InputError("prompt pairs are made of words, and this model has no tokenizer; load it with tokenizer=")
    whole("n", n, 1)
    d_vocab = getattr(getattr(model_or_tokenizer, "cfg", None), "d_vocab_out", tokenizer.vocab_size)
    answers = _answer_tokens(tokenizer)
    step = 100 // len(answers)  # years that one answer token stands for
    draw = random.Random(seed)
    clean, corrupted, columns = [], [], {"event": [], "century": [], "year": []}
    right, wrong = torch.zeros(n, d_vocab, dtype=torch.bool), torch.zeros(n, d_vocab, dtype=torch.bool)
    for i in range(n):
        event, century = EVENTS[i % len(EVENTS)], draw.choice(CENTURIES)
        year = draw.randrange(step, 100 - step)
        clean.append(f"The {event} lasted from the year {century}{year:02d} to the year {century}")
        corrupted.append(f"The {event} lasted from the year {century}01 to the year {century}")
        bound = year // step
        right[i, answers[bound + 1 :]] = True
        wrong[i, answers[: bound + (step == 1)]] = True
        for name, value in (("event", event), ("century", century), ("year", year)):
            columns[name].append(value)
    metric = SetDiff(torch.full((n,), -1), right, wrong)
    group = torch.tensor([EVENTS.index(event) for event in columns["event"]])
    return PromptPairs(clean, corrupted, metric, group=group, columns=columns)


def _answer_tokens(tokenizer: "Tokenizer") -> list[int]:
    """The tokens of 00 to 99 behind a century, or those of the digits 0 to 9 where years are split into digits."""
    start = tokenizer.encode("the year 17")
    continued = [tokenizer.encode(f"the year 17{year:02d}") for year in range(100)]
    if any(tokens[: len(start)] != start for tokens in continued):
        raise InputError(
            "years are to be split behind their century, and this tokenizer merges across it: "
            f"'the year 1732' is {tokenizer.to_str_tokens('the year 1732')}; greater-than needs another tokenizer"
        )
    following = [tokens[len(start)] for tokens in continued]
    return following if len(set(following)) == 100 else following[::10]
