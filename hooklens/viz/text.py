"""Text from models and users inside pages and figures: shown literally, never interpreted."""

import html
from collections.abc import Sequence

from hooklens.core.terminal import printable, visible

_SIGNS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}


class Html(str):
    """Markup that is safe to insert into a page; a notebook renders it."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)


def escape(text: object) -> Html:
    """Convert any text to HTML that shows exactly this text, with control characters spelled out; Html is unchanged.

    >>> escape("<b>&amp;\\x1b")
    '&lt;b&gt;&amp;amp;\\\\x1b'
    """
    if isinstance(text, Html):
        return text
    return Html(html.escape(printable(text)))


def shown_token(token: str) -> str:
    """A token with visible white space.

    >>> shown_token(" Mary"), shown_token("\\n\\n"), shown_token(""), shown_token("\\x00")
    ('·Mary', '↵↵', '∅', '\\\\x00')
    """
    return "".join(_SIGNS.get(c) or visible(c) for c in token) or "∅"


def token_markup(token: str) -> Html:
    """A token as HTML, with the signs for white space paler than its letters.

    >>> token_markup(" <i>")
    '<span style="opacity:.55">·</span>&lt;i&gt;'
    """
    shown = shown_token(token)
    faint = [i < len(token) and token[i] in _SIGNS and len(shown) == len(token) for i in range(len(shown))]
    parts = (
        f'<span style="opacity:.55">{c}</span>' if f else html.escape(c) for c, f in zip(shown, faint, strict=True)
    )
    return Html("".join(parts))


def label(text: object, longest: int = 60) -> str:
    """Escape text for a Plotly title, tick or hover box, which would interpret <b>, <a href> and &amp; as markup.

    >>> label(" <b>&amp;"), label("layer 3\\n")
    ('·&lt;b&gt;&amp;amp;', 'layer 3↵')

    Control characters and spaces at either end are written as signs.
    """
    text = str(text)
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    signs = [_SIGNS[c] if c in _SIGNS and c != " " else visible(c) for c in inner]
    shown = "".join(signs)
    shown = "·" * before + shown + "·" * (len(text) - before - len(inner))
    shown = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    return html.escape(shown, quote=False)


def token_labels(str_tokens: Sequence[str]) -> list[str]:
    """Tick labels for tokens: white space visible, long ones cut.

    >>> token_labels([" Mary", "\\n", "<b>"])
    ['·Mary', '↵', '&lt;b&gt;']
    """
    return [label(shown_token(token), 18) for token in str_tokens]


def script_safe(json_text: str) -> str:
    """Escape JSON for use inside a <script> element: no `</script>`, no `<!--`, no JavaScript line terminators.

    >>> script_safe('["</script>"]')
    '["\\\\u003c/script\\\\u003e"]'
    """
    for sign in "<>&\u2028\u2029":
        json_text = json_text.replace(sign, f"\\u{ord(sign):04x}")
    return json_text
