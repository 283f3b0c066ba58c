"""Stories: every label is found again by a reader who knows English, and not the grammar."""

import re
from collections import Counter

import pytest

import hooklens as hl
from hooklens.data.stories import MISHAPS

HER, HIM = {"she", "her"}, {"he", "him"}
GIRLS = {"Lily", "Anna", "Mia", "Zoe", "Ella", "Ruth"}
BOYS = {"Tom", "Ben", "Max", "Sam", "Leo", "Finn"}
THINGS = {"ball", "apple", "coin", "cup", "plate", "vase", "kite", "hat", "balloon", "key", "ring", "doll"}
PLACES = {"beach", "lake", "river", "school", "farm", "market", "park"}
COLOURS = {"red", "blue", "green", "yellow"}


def read(text):
    """(word, entity) for every word, from the text alone: names in order, pronouns as the last one of a gender."""
    words = re.findall(r"\w+|[.,]", text)
    character, last, labels = {}, {}, [""] * len(words)
    for i, word in enumerate(words):
        lower = word.lower()
        if word in GIRLS | BOYS:
            if word not in character:
                character[word] = "ab"[len(character)]
            labels[i] = character[word]
            last["girl" if word in GIRLS else "boy"] = labels[i]
        elif lower in HER | HIM:
            labels[i] = last["girl" if lower in HER else "boy"]
        elif lower in PLACES:
            labels[i - 1 : i + 1] = ["p", "p"]
        elif lower in THINGS:  # with its colour and its article
            assert words[i - 1] in COLOURS and words[i - 2].lower() in ("a", "the")
            labels[i - 2 : i + 1] = ["o"] * 3
        elif lower in ("it", "they"):
            labels[i] = "o" if lower == "it" else "a b"
    return list(zip(words, labels, strict=True)), {letter: name for name, letter in character.items()}


@pytest.mark.parametrize("seed", [0, 1])
def test_reading_a_story_finds_every_label_and_entity(seed):
    data = hl.data.tiny_stories(seed=seed)
    pronouns = Counter()
    for i in range(200):
        story = data.story(i)
        seen, characters = read(story.text)
        assert seen == list(zip(story.words, story.refers, strict=True)), story.text
        assert characters == {who: story.entities[who] for who in "ab"}
        assert f"the {story.entities['p']}" in story.text and f"a {story.entities['o']}" in story.text
        pronouns.update(word.lower() for word in story.words)
    assert min(pronouns[word] for word in ("she", "her", "he", "him", "it", "they")) > 10


def test_stories_hold_together():
    data = hl.data.tiny_stories()
    for i in range(200):
        story = data.story(i)
        thing, place = story.entities["o"].split()[1], story.entities["p"]
        mishap = next(m for m in MISHAPS if thing in m.objects)
        assert place in mishap.places  # no tree in a kitchen
        helper = [who for word, who in zip(story.words, story.refers, strict=True) if who in ("a", "b")]
        assert (
            helper[0] == "a" and "b" in helper[helper.index("a") :]
        )  # the one in need is met before the one who helps
        sentences = story.text.split(". ")
        assert len(sentences) == 8 and all(sentence[0].isupper() for sentence in sentences)
        # cause, effect, repair, in this order
        keys = [
            max((w for w in s.split() if "{" not in w), key=len) for s in (mishap.cause, mishap.effect, mishap.mend)
        ]
        places = [next(n for n, s in enumerate(sentences) if key in s) for key in keys]
        assert places == sorted(places)


def test_tokens_are_words_and_give_the_text_back():
    data = hl.data.tiny_stories()
    for i in range(50):
        story = data.story(i)
        tokens = data.tokenizer.encode(story.text)
        assert len(tokens) == len(story.words) and data.tokenizer.to_string(tokens) == story.text
        assert data.tokenizer.to_str_tokens(tokens) == story.pieces
    # every token is used
    used = {piece for i in range(1500) for piece in data.story(i).pieces}
    assert used == set(data.vocabulary) - {"<end>"}
    assert data.tokenizer.find_token(" she") is not None


def test_no_entities_of_a_held_out_story_are_trained_on():
    data = hl.data.tiny_stories(150)
    parts = {}
    for name, batches in (("train", [data.batch(step, 16) for step in range(4)]), ("held out", data.held_out(16))):
        rows = [row for batch in batches for row in data.tokenizer.to_string(batch.inputs)]
        parts[name] = [text for row in rows for text in row.split("<end>")[1:-1]]  # the last one is cut
        assert all(row.startswith("<end>") for row in rows)
    kept = {name: {entities_of(text) for text in texts} for name, texts in parts.items()}
    assert len(kept["train"]) > 50 and len(kept["held out"]) > 50 and not kept["train"] & kept["held out"]
    share = sum(data.is_held_out(data.story(i)) for i in range(2000)) / 2000
    assert 0.07 < share < 0.13


def entities_of(text):
    seen, characters = read(text)
    words = [word for word, _ in seen]
    thing = next(i for i, word in enumerate(words) if word in THINGS)
    return characters["a"], characters["b"], words[thing - 1], words[thing], next(w for w in words if w in PLACES)


def test_the_combinations_of_entities_are_as_many_as_the_documentation_says():
    couples = 6 * 5 + 6 * 6 + 6 * 6 + 6 * 5
    assert couples * sum(len(m.objects) * len(COLOURS) * len(m.places) for m in MISHAPS) == 19_008
    assert "19,008" in hl.data.tiny_stories.__doc__
