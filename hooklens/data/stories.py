"""Short stories from a grammar: characters, objects, cause and effect, and which entity each word refers to."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from hooklens.core.arguments import seed_number, whole
from hooklens.data.batches import Batch, TrainingData, next_token_batch

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer

GIRLS = ("Lily", "Anna", "Mia", "Zoe", "Ella", "Ruth")
BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Finn")
PLACES = ("park", "garden", "beach", "kitchen", "school", "forest")
COLOURS = ("red", "blue", "green", "yellow")
_PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "him", "his")}  # subject, object, possessive


@dataclass(frozen=True)
class Mishap:
    """What can go wrong with some objects, why, and what another character does about it."""

    objects: tuple[str, ...]
    cause: str
    effect: str
    mend: str
    mended: str


MISHAPS = (
    Mishap(
        ("ball", "apple", "coin"),
        "{a} ran and did not look , so {o} rolled into the water .",
        "{a} could not reach {o.it} .",
        "{b} took a long stick and pulled {o} out of the water .",
        "{o} was wet , but {o.it} was back .",
    ),
    Mishap(
        ("cup", "plate", "vase"),
        "{a} jumped and hit {o} , so {o.it} fell and broke .",
        "{a} looked at the pieces .",
        "{b} brought some glue and fixed {o} .",
        "{o} was as good as new .",
    ),
    Mishap(
        ("kite", "hat", "balloon"),
        "{a} let go for a moment , and the wind took {o} up into a tree .",
        "{a} was too small to climb .",
        "{b} climbed the tree and brought {o} down .",
        "{o} was safe .",
    ),
    Mishap(
        ("key", "ring", "doll"),
        "{a} put {o} down to play and forgot where {o.it} was .",
        "{a} looked and looked , but {o.it} was gone .",
        "{b} looked under a bench and found {o} there .",
        "{o} was not lost any more .",
    ),
)
_OBJECTS = tuple(chain.from_iterable(mishap.objects for mishap in MISHAPS))
_OPENINGS = (
    "One day , {a} went to the {p} with {o.new} .",
    "{a} had {o.new} and took {o.it} to the {p} .",
    "The sun was out , and {a} played in the {p} with {o.new} .",
)
_FEELINGS = ("sad", "upset", "worried")
_MEETINGS = (
    "Then {b} came and asked {a.him} what was wrong .",
    "{b} was near and heard {a.him} cry .",
)
_ENDINGS = (
    "{a} was happy again , because {b} had helped {a.him} .",
    "{a} smiled and said thank you to {b.him} .",
    "{a} hugged {b.him} , and they played until dark .",
)


@dataclass(frozen=True)
class Story:
    """The words of a story, and for each the entities that it refers to: "a", "b", "o", "p"; none for most words.

    >>> story = tiny_stories().story(0)
    >>> len(story.words) == len(story.refers), sorted(story.entities)
    (True, ['a', 'b', 'o', 'p'])
    """

    words: tuple[str, ...]
    refers: tuple[str, ...]
    entities: dict[str, str]

    @property
    def text(self) -> str:
        """The story as people write it."""
        return " ".join(self.words).replace(" ,", ",").replace(" .", ".")


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
                self._add("they" if piece == "they" else piece, "a b" if piece == "they" else "")
        self.words[start] = self.words[start].capitalize() if self.words[start].islower() else self.words[start]

    def _mention(self, who: str, form: str = "") -> None:
        kind, name = self.kinds[who], self.entities[who]
        known = self.last.get(kind) == who
        self.last[kind] = who
        for word in self._form(kind, name, form, known).split():
            self._add(word, who)

    def _form(self, kind: str, name: str, form: str, known: bool) -> str:
        if kind == "object":
            return "it" if form == "it" else f"{'a' if form == 'new' else 'the'} {name}"
        if kind == "place":
            return name
        subject, other, _ = _PRONOUNS[kind]
        if form == "him":
            return other if known else name
        # A pronoun only where no other character of that kind was mentioned since.
        return subject if known and self.draw.random() < 0.5 else name

    def _add(self, word: str, refers: str) -> None:
        self.words.append(word)
        self.refers.append(refers)


@dataclass(frozen=True)
class TinyStories(TrainingData):
    """Stories of one mishap each; story `i` is a function of the seed and `i`."""

    window: int
    seed: int

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """One token a word."""
        from hooklens.data.vocabularies import word_tokenizer

        return word_tokenizer(self.vocabulary, split=r"\s+")

    @cached_property
    def vocabulary(self) -> list[str]:
        """Every word of every story, behind the mark that ends one."""
        sentences = chain(_OPENINGS, _MEETINGS, _ENDINGS, *((m.cause, m.effect, m.mend, m.mended) for m in MISHAPS))
        fixed = {word for sentence in sentences for word in sentence.split() if not word.startswith("{")}
        fixed |= {"was", "because", ".", "a", "the", "it", "they", *_FEELINGS, *chain(*_PRONOUNS.values())}
        fixed |= {word.capitalize() for word in fixed if word.islower()}
        return ["<end>", *sorted(fixed | {*GIRLS, *BOYS, *PLACES, *COLOURS, *_OBJECTS})]

    @property
    def d_vocab(self) -> int:
        """The number of words."""
        return len(self.vocabulary)

    def story(self, i: int) -> Story:
        """Story number `i`."""
        draw = random.Random(f"{self.seed} {i}")
        mishap = draw.choice(MISHAPS)
        kinds = {"a": draw.choice(("girl", "boy")), "b": draw.choice(("girl", "boy")), "o": "object", "p": "place"}
        names = {"girl": draw.sample(GIRLS, 2), "boy": draw.sample(BOYS, 2)}
        entities = {"a": names[kinds["a"]][0], "b": names[kinds["b"]][1]}
        entities |= {"o": f"{draw.choice(COLOURS)} {draw.choice(mishap.objects)}", "p": draw.choice(PLACES)}
        teller = _Teller(entities, kinds, draw)
        feeling = f"{{a}} was {draw.choice(_FEELINGS)} ."
        for sentence in (
            draw.choice(_OPENINGS),
            mishap.cause,
            mishap.effect,
            feeling,
            draw.choice(_MEETINGS),
            mishap.mend,
            mishap.mended,
            draw.choice(_ENDINGS),
        ):
            teller.tell(sentence)
        return Story(tuple(teller.words), tuple(teller.refers), entities)

    def _windows(self, first: int, size: int) -> Batch:
        """Windows of whole stories one after the other, each behind the mark <end>."""
        rows, at = [], first
        numbers = {word: i for i, word in enumerate(self.vocabulary)}
        for _ in range(size):
            row: list[int] = []
            while len(row) < self.window + 1:
                row += [0, *(numbers[word] for word in self.story(at).words)]
                at += 1
            rows.append(row[: self.window + 1])
        return next_token_batch(torch.tensor(rows))

    def batch(self, step: int, size: int) -> Batch:
        """Fresh stories."""
        each = -(-self.window // 20) * size  # no story has fewer words
        return self._windows(2**20 + step * each, size)

    def held_out(self, size: int) -> Iterator[Batch]:
        """64 windows of stories that no step tells."""
        each = -(-self.window // 20)
        for start in range(0, 64, size):
            yield self._windows(start * each, min(size, 64 - start))

    def description(self) -> str:
        """What there is to learn."""
        return f"the next word of short stories, with {self.d_vocab} words: who has what, what happened and why"

    def identity(self) -> dict[str, Any]:
        """What identifies the data."""
        return {"task": "tiny stories", "window": self.window, "seed": self.seed}


def tiny_stories(window: int = 64, *, seed: int = 0) -> TinyStories:
    """Stories of a child, an object, a mishap, and another child who helps; every word's entity is known.

    >>> print(tiny_stories().story(1).text[:60])
    """
    whole("window", window, 1)
    seed_number(seed)
    return TinyStories(window, seed)


def entities_of(words: Sequence[str]) -> list[str]:
    """Which entity each word of a story refers to, found by reading it: the labels of `Story` are tested against this.

    Names are the characters in the order in which they appear; "she" and "he" mean the last one mentioned of that
    kind, "it", a colour and an object mean the object.
    """
    kind = {**dict.fromkeys(GIRLS, "girl"), **dict.fromkeys(BOYS, "boy")}
    pronoun = {form: kind for kind, forms in _PRONOUNS.items() for form in forms}
    letters: dict[str, str] = {}
    last: dict[str, str] = {}
    labels = []
    for i, word in enumerate(words):
        lower, following = word.lower(), words[i + 1].lower() if i + 1 < len(words) else ""
        if word in kind:
            if word not in letters:
                letters[word] = "ab"[len(letters)]
            last[kind[word]] = letters[word]
            labels.append(letters[word])
        elif lower in pronoun:
            labels.append(last[pronoun[lower]])
        elif lower == "they":
            labels.append("a b")
        elif lower == "it" or lower in COLOURS or lower in _OBJECTS or (lower in ("a", "the") and following in COLOURS):
            labels.append("o")
        else:
            labels.append("p" if lower in PLACES else "")
    return labels
