"""The letters that byte-level vocabularies write bytes as."""

from functools import lru_cache


@lru_cache
def byte_values() -> dict[str, int]:
    """GPT-2's alphabet: which byte each letter of a byte-level vocabulary stands for.

    Bytes that print as Latin-1 stand for themselves, the others for the letters from U+0100 on, in order.

    >>> byte_values()["Ġ"], byte_values()["a"]
    (32, 97)
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}
