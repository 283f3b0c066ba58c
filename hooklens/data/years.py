"""Greater-than: "The war lasted from the year 1732 to the year 17" is followed by a number above 32."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.arguments import python_draws, whole
from hooklens.core.errors import InputError
from hooklens.core.precision import widened
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.pronouns import tokenizer_of
from hooklens.metrics import AtPosition

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer
    from hooklens.pretrained.tokenizer import Tokenizer

EVENTS = (
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
)
CENTURIES = range(11, 18)
PROMPT = "The {event} lasted from the year {century}{year:02d} to the year {century}"


@dataclass(frozen=True, eq=False)
class ProbabilityDiff(AtPosition):
    """The probability of any right answer minus that of any wrong one: between -1 and 1."""

    right: Bool[Tensor, "pair d_vocab"]
    wrong: Bool[Tensor, "pair d_vocab"]

    def on_read(self, logits: Float[Tensor, "row read d_vocab"]) -> Float[Tensor, "row"]:
        probs = widened(logits[:, 0]).softmax(-1)
        weights = self.right.to(probs) - self.wrong.to(probs)
        return (probs * weights).sum(-1)


@dataclass(frozen=True)
class _Years:
    """How a tokenizer writes years: what may follow a century, and which years are a century and one of these.

    `answers` are the tokens of 00 to 99, or those of the digits 0 to 9 where years are split into digits.
    """

    answers: list[int]
    usable: dict[int, list[int]]

    @property
    def step(self) -> int:
        """The number of years that one answer stands for."""
        return 100 // len(self.answers)


def greater_than(
    model_or_tokenizer: Union["HookedTransformer", "Tokenizer"], n: int = 64, *, seed: int = 0
) -> PromptPairs:
    """`n` pairs in which the first year bounds the last one; in the corrupted prompt it is the year 01, no bound.

    A tokenizer that has two-digit numbers as tokens gets sets of these: right are those above the year's last two
    digits, wrong all others. A tokenizer of single digits gets digits for the tens: right are those above, wrong those
    below; the year's own is neither. Years that a tokenizer does not split behind their century are left out, and all
    prompts have the length of most.

    Columns: "event", "century", "year" (its last two digits). The metric is the probability of the right set minus that
    of the wrong set. Prompts of one event are a group.

    >>> from hooklens.pretrained.tokenizer import tiny_tokenizer
    >>> pairs = greater_than(tiny_tokenizer(), 4)
    >>> len(pairs), pairs.clean[0][-2:] == str(pairs["century"][0])
    (4, True)

    Reference: Hanna et al. (2023), "How does GPT-2 compute greater-than?", section 2.
    """
    tokenizer = tokenizer_of(model_or_tokenizer)
    whole("n", n, 1)
    draw = python_draws(seed)
    d_vocab = getattr(getattr(model_or_tokenizer, "cfg", None), "d_vocab_out", tokenizer.vocab_size)
    years, events = _years_of(tokenizer), _events_of_one_length(tokenizer)
    rows = []
    for i in range(n):
        century = draw.choice(sorted(years.usable))
        rows.append((events[i % len(events)], century, draw.choice(years.usable[century])))
    right, wrong = torch.zeros(n, d_vocab, dtype=torch.bool), torch.zeros(n, d_vocab, dtype=torch.bool)
    for i, (_, _, year) in enumerate(rows):
        bound = year // years.step
        right[i, years.answers[bound + 1 :]] = True
        wrong[i, years.answers[: bound + (years.step == 1)]] = True
    return PromptPairs(
        [PROMPT.format(event=event, century=century, year=year) for event, century, year in rows],
        [PROMPT.format(event=event, century=century, year=1) for event, century, _ in rows],
        ProbabilityDiff(torch.full((n,), -1), right, wrong),
        group=torch.tensor([EVENTS.index(event) for event, _, _ in rows]),
        columns=dict(zip(("event", "century", "year"), map(list, zip(*rows, strict=True)), strict=True)),
    )


def _events_of_one_length(tokenizer: "Tokenizer") -> list[str]:
    lengths = {event: len(tokenizer.encode(f"The {event} lasted")) for event in EVENTS}
    most, _ = Counter(lengths.values()).most_common(1)[0]
    return [event for event in EVENTS if lengths[event] == most]


def _years_of(tokenizer: "Tokenizer") -> _Years:
    """The years that are split behind their century, and the tokens that follow it."""
    following: dict[tuple[int, int], int] = {}
    for century in CENTURIES:
        start = tokenizer.encode(f"the year {century}")
        for year in range(100):
            tokens = tokenizer.encode(f"the year {century}{year:02d}")
            if tokens[: len(start)] == start and len(tokens) > len(start):
                following[century, year] = tokens[len(start)]
    # of the centuries in which a year is split, the token that most of them have
    seen = [Counter(following[c, year] for c in CENTURIES if (c, year) in following) for year in range(100)]
    most = [counts.most_common(1)[0][0] if counts else None for counts in seen]
    in_digits = all(most[year] == most[year // 10 * 10] for year in range(100))
    answers = most[::10] if in_digits else most
    if None in answers or len(set(answers)) != len(answers):
        raise InputError(
            "greater-than needs a tokenizer that splits years behind their century into two digits that are one token, "
            f"or into single digits; this one reads 'the year 1732' as {tokenizer.to_str_tokens('the year 1732')}"
        )
    step = 100 // len(answers)
    lowest = max(step, 2)  # the year 01 is the corrupted prompt's
    usable = {
        century: [year for year in range(lowest, 100 - step) if following.get((century, year)) == most[year]]
        for century in CENTURIES
        if following.get((century, 1)) == most[1]
    }
    return _Years([int(token) for token in answers if token is not None], {c: ys for c, ys in usable.items() if ys})
