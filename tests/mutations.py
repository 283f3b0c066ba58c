"""Damage to files, drawn by seed: to bytes, to JSON by its structure, to the headers of safetensors and GGUF files."""

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

from hooklens.core.envelope import Schema, rendered
from hooklens.pretrained.gguf import _Header

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


def resealed(content: bytes, change: Callable[[Any], Any]) -> bytes:
    """A file in our envelope with its content changed, its digest set right."""
    if content[:1] == b"{":
        found = json.loads(content)
        schema = Schema(found["schema"], found["version"], "a file", "save", as_json=True)
        return rendered(schema, change(found["content"]), {}, "").encode()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    found = json.loads(header["__metadata__"]["hooklens"])
    described = {name: (e["dtype"], e["shape"]) for name, e in header.items() if name != "__metadata__"}
    schema = Schema(found["schema"], found["version"], "a file", "save")
    header["__metadata__"]["hooklens"] = rendered(schema, change(found["content"]), described, found["data"])
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def damaged_content(content: bytes, draw: random.Random) -> bytes:
    """A file in our envelope, its content damaged as JSON, its digest set right; as bytes where that cannot be."""

    def change(value: Any) -> Any:
        return json.loads(json.dumps(_changed(value, draw)).replace('"@deep"', _DEEP))

    try:
        return resealed(content, change)
    except (ValueError, RecursionError):  # NaN, or nested too deeply
        return damaged_bytes(content, draw)


def damaged_numbers(content: bytes, draw: random.Random) -> bytes:
    """One number of a GGUF file's header, wherever one may stand, exchanged for an odd one."""
    at = draw.randrange(4, min(len(content), 3000) - 8)
    number = draw.choice(_NUMBERS)
    return content[:at] + struct.pack("<I", number) + content[at + 4 :]


def damaged_metadata(content: bytes, draw: random.Random) -> bytes:
    """One value of a GGUF file's metadata exchanged for another, the file written anew around it."""
    header = _Header(content, "m")
    version, n_tensors, n_keys = header.number("I"), header.number("Q"), header.number("Q")
    metadata = {header.string(): header.value(header.number("I")) for _ in range(n_keys)}
    start = header.at
    for _ in range(n_tensors):
        header.description()
    data = -(-header.at // 32) * 32
    metadata = _changed(metadata, draw)
    entries = list(metadata.items()) if isinstance(metadata, dict) else []
    body = b"".join(_text(key) + _value(value) for key, value in entries) + content[start : header.at]
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, len(entries)) + body
    return head + bytes(-len(head) % 32) + content[data:]


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A metadata value with the number of its type in front; what has none becomes a text."""
    if isinstance(value, list):
        first = _value(value[0]) if value else struct.pack("<I", 4)
        alike = [one for one in value if type(one) is type(value[0]) and not isinstance(one, list)]
        return struct.pack("<I", 9) + first[:4] + struct.pack("<Q", len(alike)) + b"".join(_value(v)[4:] for v in alike)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<Iq", 11, max(-(2**63), min(value, 2**63 - 1)))
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    return struct.pack("<I", 8) + _text(str(value))


def _changed(value: Any, draw: random.Random) -> Any:
    """The value with one node of it changed, drawn level by level so that those near the top have their share."""
    if isinstance(value, str) and value[:1] in ("{", "[") and draw.random() < 0.9:
        try:
            return json.dumps(_changed(json.loads(value), draw)).replace('"@deep"', _DEEP)
        except (ValueError, RecursionError):
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
