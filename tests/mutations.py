"""Damage to files, drawn by seed: to bytes, to JSON by its structure, to the headers of safetensors and GGUF files."""

import json
import math
import random
import struct
from typing import Any

_DEEP = "[" * 50_000 + "]" * 50_000
_ODD: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 10**9, 2**63, 10**30, 0.5, -1e-5, math.nan, math.inf, 1e300, "", "x", "\0",
    "é" * 3000, "\ud800", [], [1], [None], [[]], {}, {"a": 1}, "@deep",
]  # fmt: skip
_NUMBERS = [0, 1, 2, 7, 8, 9, 12, 255, 2**16, 2**31 - 1, 2**32 - 1, 10**9]


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """The file cut short, or with bytes of it changed, removed, doubled or exchanged for text."""
    if not content:
        return b"x"
    at = draw.randrange(len(content))
    size = draw.choice([1, 1, 2, 8, 64])
    kind = draw.randrange(5)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes(draw.randrange(256) for _ in range(size)) + content[at + size :]
    if kind == 2:
        return content[:at] + content[at + size :]
    if kind == 3:
        return content[:at] + content[at : at + size] * 2 + content[at + size :]
    return content[:at] + draw.choice([b"\xff", b"\0", b"[" * 3000, b"1e999", b'"', b"}"]) + content[at + size :]


def damaged_json(content: bytes, draw: random.Random) -> bytes:
    """One or two values of a JSON file exchanged for odd ones, or a key removed or added; JSON within texts too."""
    value = json.loads(content)
    for _ in range(draw.choice([1, 1, 2])):
        value = _changed(value, draw)
    return json.dumps(value).replace('"@deep"', _DEEP).encode()


def damaged_lines(content: bytes, draw: random.Random) -> bytes:
    """One line of a JSONL file damaged as JSON."""
    lines = content.splitlines()
    at = draw.randrange(len(lines))
    lines[at] = damaged_json(lines[at], draw)
    return b"\n".join(lines)


def damaged_header(content: bytes, draw: random.Random) -> bytes:
    """The JSON header of a safetensors file damaged, its length set right."""
    length = int.from_bytes(content[:8], "little")
    header = damaged_json(content[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def damaged_numbers(content: bytes, draw: random.Random) -> bytes:
    """One number of a GGUF file's header, wherever one may stand, exchanged for an odd one."""
    at = draw.randrange(4, min(len(content), 3000) - 8)
    number = draw.choice(_NUMBERS)
    return content[:at] + struct.pack("<I", number) + content[at + 4 :]


def _changed(value: Any, draw: random.Random) -> Any:
    """The value with one node of it changed, drawn level by level so that those near the top have their share."""
    if isinstance(value, str) and value[:1] in ("{", "[") and draw.random() < 0.9:
        try:
            return json.dumps(_changed(json.loads(value), draw)).replace('"@deep"', _DEEP)
        except ValueError:
            return draw.choice(_ODD)
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return draw.choice(_ODD)
    if isinstance(value, list):
        at = draw.randrange(len(value))
        return [_changed(one, draw) if i == at else one for i, one in enumerate(value)]
    key = draw.choice(list(value))
    if draw.random() < 0.1:
        return {k: v for k, v in value.items() if k != key} | {draw.choice(["", "x", key * 2]): draw.choice(_ODD)}
    return {k: _changed(v, draw) if k == key else v for k, v in value.items()}
