"""The words of a text, which a byte-pair tokenizer never merges across."""

import re
from unicodedata import category

# GPT-2's pattern of a word: letters, digits or signs with the space before them; the last space joins the next word.
_WORD = re.compile(r"'(?:[stmd]|ll|ve|re)| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+", re.ASCII)


def words(text: str) -> list[str]:
    """The words of a text, by GPT-2's pattern. A letter, digit or space of any script counts as one.

    >>> words("It's 12 o'clock,  été!")
    ['It', "'s", ' 12', ' o', "'", 'clock', ',', ' ', ' été', '!']
    """
    plain = "".join(map(_ascii_like, text))
    return [text[match.start() : match.end()] for match in _WORD.finditer(plain)]


def _ascii_like(character: str) -> str:
    """An ASCII character of the same kind: the pattern of `re` knows no Unicode categories."""
    if character.isascii():
        return character
    if character.isspace():
        return "\n"
    return {"L": "a", "N": "0"}.get(category(character)[0], "!")
