"""Text on its way to a terminal or a page: names from files, models and users are shown and never act.

A name may hold terminal escapes (ESC, OSC, the C1 controls) and marks that turn the direction of text around. Every
line that is printed goes through here.
"""

import json
from typing import Any


def visible(text: str) -> str:
    """Text with characters that do not print (newlines, terminal escapes, direction marks) written out.

    >>> visible("a\\tb\\x1b[31m")
    'a\\\\tb\\\\x1b[31m'
    """
    shown = [c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text]
    return "".join(shown)


def printable(text: object) -> str:
    """Text of one line or several as it may be printed: as `visible`, with line breaks and tabs as they are.

    >>> printable("one\\ntwo \\x9b31m")
    'one\\ntwo \\\\x9b31m'
    """
    shown = [c if c in "\n\t" else visible(c) for c in str(text)]
    return "".join(shown)


def json_line(value: Any) -> str:
    """Strict JSON for a terminal: characters that do not print are escaped as JSON has it, all others stay.

    >>> print(json_line({"name": "é\\x9b\\u202e\\x7f"}))
    {"name": "é\\u009b\\u202e\\u007f"}
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text = text.replace("\x7f", "\\u007f")  # which json.dumps leaves as it is
    shown = [c if c.isprintable() else json.dumps(c)[1:-1] for c in text]
    return "".join(shown)
