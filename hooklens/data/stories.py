"""Short stories from a grammar: characters, objects, cause and effect, and which entity each word refers to."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.core.arguments import seed_number, whole
from hooklens.data.batches import Batch, TrainingData, hashed_share, next_token_batch

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer

GIRLS = ("Lily", "Anna", "Mia", "Zoe", "Ella", "Ruth")
BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Finn")
COLOURS = ("red", "blue", "green", "yellow")
END = "<end>"
_HELD_OUT = 0.1
_EVALUATED = 64  # held-out windows
_PRONOUNS = {"girl": ("she", "her"), "boy": ("he", "him")}  # subject, object
_WORD = rf"{END}| ?\w+|\W"


@dataclass(frozen=True)
class Mishap:
    """What can go wrong with some objects in some places, why, and what another character does about it.

    In sentences `{a}` and `{b}` are the characters, `{o}` the object, `{p}` the place. `{b}` may become a pronoun where
    that is clear, `{b.him}` is one wherever that is clear, `{o.it}` is "it", `{o.new}` has "a" in place of "the".
    """

    objects: tuple[str, ...]
    places: tuple[str, ...]
    cause: str
    effect: str
    mend: str
    mended: str


MISHAPS = (
    Mishap(
        objects=("ball", "apple", "coin"),
        places=("beach", "lake", "river"),
        cause="{a} ran and did not look , so {o} rolled into the water .",
        effect="{a} could not reach {o.it} .",
        mend="{b} took a long stick and pulled {o} out of the water .",
        mended="{o} was wet , but {o.it} was back .",
    ),
    Mishap(
        objects=("cup", "plate", "vase"),
        places=("school", "farm", "market"),
        cause="{a} jumped and hit {o} , so {o.it} fell and broke .",
        effect="{a} looked at the pieces .",
        mend="{b} brought some glue and fixed {o} .",
        mended="{o} was as good as new .",
    ),
    Mishap(
        objects=("kite", "hat", "balloon"),
        places=("park", "farm", "lake"),
        cause="{a} let go for a moment , and the wind took {o} up into a tree .",
        effect="{a} was too small to climb .",
        mend="{b} climbed the tree and brought {o} down .",
        mended="{o} was safe .",
    ),
    Mishap(
        objects=("key", "ring", "doll"),
        places=("park", "school", "market"),
        cause="{a} put {o} down to play and forgot where {o.it} was .",
        effect="{a} looked and looked , but {o.it} was gone .",
        mend="{b} looked under a bench and found {o} there .",
        mended="{o} was not lost any more .",
    ),
)
_OPENINGS = (
    "One day , {a} went to {p} with {o.new} .",
    "{a} had {o.new} and took {o.it} to {p} .",
    "The sun was out , and {a} played at {p} with {o.new} .",
)
_FEELINGS = ("{a} was sad .", "{a} was upset .", "{a} was worried .")
_MEETINGS = ("Then {b} came and asked {a.him} what was wrong .", "{b} was near and heard {a.him} cry .")
_ENDINGS = (
    "{a} was happy again , because {b} had helped .",
    "{a} smiled and said thank you to {b.him} .",
    "{a} hugged {b.him} , and they played until dark .",
)


@dataclass(frozen=True)
class Story:
    """The words of a story, and for each the entities that it refers to: "a", "b", "o", "p"; "" for most words.

    >>> story = tiny_stories().story(0)
    >>> len(story.words) == len(story.refers), sorted(story.entities)
    (True, ['a', 'b', 'o', 'p'])
    """

    words: tuple[str, ...]
    refers: tuple[str, ...]
    entities: dict[str, str]

    @property
    def pieces(self) -> list[str]:
        """The words with the spaces before them: the tokens of the story."""
        spaces = ("" if i == 0 or word in ",." else " " for i, word in enumerate(self.words))
        return [space + word for space, word in zip(spaces, self.words, strict=True)]

    @property
    def text(self) -> str:
        """The story as people write it."""
        return "".join(self.pieces)


class _Teller:
    """Writes sentences, with a pronoun where the last one mentioned of its kind is meant."""

    def __init__(self, entities: dict[str, str], kinds: dict[str, str], draw: random.Random):
        self.entities, self.kinds, self.draw = entities, kinds, draw
        self.words: list[str] = []
        self.refers: list[str] = []
        self.last: dict[str, str] = {}

    def tell(self, sentence: str) -> None:
        """One sentence; its first word gets a capital."""
        start = len(self.words)
        for piece in sentence.split():
            if piece.startswith("{"):
                self._mention(*piece.strip("{}").split("."))
            else:
                self._add(piece, "a b" if piece == "they" else "")
        first = self.words[start]
        self.words[start] = first[0].upper() + first[1:]

    def _mention(self, who: str, form: str = "") -> None:
        kind = self.kinds[who]
        known = self.last.get(kind) == who
        self.last[kind] = who
        for word in self._form(kind, self.entities[who], form, known).split():
            self._add(word, who)

    def _form(self, kind: str, name: str, form: str, known: bool) -> str:
        if form == "it":
            return "it"
        if kind in ("object", "place"):
            return f"{'a' if form == 'new' else 'the'} {name}"
        subject, other = _PRONOUNS[kind]
        if form == "him":
            return other if known else name
        # A pronoun only where no other character of that kind was mentioned since.
        return subject if known and self.draw.random() < 0.5 else name

    def _add(self, word: str, refers: str) -> None:
        self.words.append(word)
        self.refers.append(refers)


@dataclass(frozen=True)
class TinyStories(TrainingData):
    """Stories of one mishap each; story `i` is a function of the seed and `i`.

    A story is held out, with all that have the same two characters, object and place, by a hash of these four.
    """

    window: int
    seed: int

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """One token for each word with the space before it."""
        from hooklens.data.vocabularies import word_tokenizer

        return word_tokenizer(self.vocabulary, _WORD)

    @cached_property
    def vocabulary(self) -> list[str]:
        """The mark that ends a story, and every word of every story."""
        mishaps = chain.from_iterable((m.cause, m.effect, m.mend, m.mended) for m in MISHAPS)
        sentences = [*_OPENINGS, *_FEELINGS, *_MEETINGS, *_ENDINGS, *mishaps]
        words = {word for sentence in sentences for word in sentence.split() if not word.startswith("{")}
        words -= {",", ".", "One"}
        words |= {"a", "the", "The", "it", *chain.from_iterable(_PRONOUNS.values())}
        words |= {subject.capitalize() for subject, _ in _PRONOUNS.values()}
        words |= {*GIRLS, *BOYS, *COLOURS, *chain.from_iterable((*m.objects, *m.places) for m in MISHAPS)}
        firsts = {"One", "The", *GIRLS, *BOYS}  # begin a story, without a space
        return [END, ",", ".", *sorted(firsts), *sorted(f" {word}" for word in words)]

    @property
    def d_vocab(self) -> int:
        """The number of tokens."""
        return len(self.vocabulary)

    def story(self, i: int) -> Story:
        """Story number `i`."""
        draw = random.Random(f"{self.seed} {i}")
        mishap = draw.choice(MISHAPS)
        kinds = {"a": draw.choice(("girl", "boy")), "b": draw.choice(("girl", "boy")), "o": "object", "p": "place"}
        names = {"girl": draw.sample(GIRLS, 2), "boy": draw.sample(BOYS, 2)}
        entities = {"a": names[kinds["a"]][0], "b": names[kinds["b"]][1]}
        entities |= {"o": f"{draw.choice(COLOURS)} {draw.choice(mishap.objects)}", "p": draw.choice(mishap.places)}
        teller = _Teller(entities, kinds, draw)
        for sentence in (
            draw.choice(_OPENINGS),
            *(mishap.cause, mishap.effect),
            draw.choice(_FEELINGS),
            draw.choice(_MEETINGS),
            *(mishap.mend, mishap.mended),
            draw.choice(_ENDINGS),
        ):
            teller.tell(sentence)
        return Story(tuple(teller.words), tuple(teller.refers), entities)

    def is_held_out(self, story: Story) -> bool:
        """Whether no story with these entities is trained on."""
        return hashed_share(self.seed, " ".join(story.entities[who] for who in "abop")) < _HELD_OUT

    def _row(self, number: int, *, held_out: bool) -> list[int]:
        """The window of a number: stories of one part, one behind the other, each after the end mark."""
        tokens: list[int] = []
        at = number * 2**20  # far more stories than fit into a window
        while len(tokens) <= self.window:
            story, at = self.story(at), at + 1
            if self.is_held_out(story) == held_out:
                tokens += [self._numbers[word] for word in (END, *story.pieces)]
        return tokens[: self.window + 1]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.vocabulary)}

    def batch(self, step: int, size: int) -> Batch:
        """Fresh stories that are not held out."""
        return next_token_batch(self._rows(range(step * size, (step + 1) * size), held_out=False))

    def held_out(self, size: int) -> Iterator[Batch]:
        """64 windows of held-out stories."""
        for start in range(0, _EVALUATED, size):
            numbers = range(start, min(start + size, _EVALUATED))
            yield next_token_batch(self._rows(numbers, held_out=True))

    def _rows(self, numbers: range, *, held_out: bool) -> Int[Tensor, "row pos"]:
        return torch.tensor([self._row(number, held_out=held_out) for number in numbers])

    def description(self) -> str:
        """What there is to learn."""
        return (
            f"the next word of short stories, with {self.d_vocab} tokens: who has what, what went wrong and why, and "
            "who helps"
        )

    def identity(self) -> dict[str, Any]:
        """What identifies the data."""
        return {"task": "tiny stories", "window": self.window, "seed": self.seed}


def tiny_stories(window: int = 64, *, seed: int = 0) -> TinyStories:
    """Stories of a child, an object, a mishap, and another child who helps; the entity of every word is known.

    >>> story = tiny_stories().story(1)
    >>> story.text.endswith("."), [word for word, who in zip(story.words, story.refers) if who == "p"][0]
    (True, 'the')

    There are 19,008 combinations of two children, an object and a place; a tenth of them is held out.
    """
    whole("window", window, 1)
    seed_number(seed)
    return TinyStories(window, seed)
