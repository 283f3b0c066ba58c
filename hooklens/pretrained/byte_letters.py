"""The letters that byte-level vocabularies use for bytes."""

from functools import lru_cache


@lru_cache
def byte_values() -> dict[str, int]:
    """GPT-2's alphabet: the byte that each letter of a byte-level vocabulary stands for.

    A byte that is printable in Latin-1 is its own letter. The other bytes use the letters from U+0100 on, in order.

    >>> byte_values()["Ġ"], byte_values()["a"]
    (32, 97)
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


def in_letters(text: str) -> str:
    """Write a text in the byte alphabet.

    >>> in_letters(" the")
    'Ġthe'
    """
    return "".join(_letters()[byte] for byte in text.encode())


def in_byte_alphabet(token: str) -> bool:
    """Whether a token is written in the byte alphabet.

    >>> in_byte_alphabet("Ġthe"), in_byte_alphabet(" the")
    (True, False)
    """
    return byte_values().keys() >= set(token)


@lru_cache
def _letters() -> dict[int, str]:
    return {byte: letter for letter, byte in byte_values().items()}
