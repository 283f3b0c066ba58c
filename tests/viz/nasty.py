"""Tokens that would break a page if any of them were taken for markup."""

NASTY = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "&amp;",
    "<b>",
    '" onmouseover="alert(1)',
    "<a href='javascript:alert(1)'>link</a>",
    "<!--",
    "%{x}",
    "$x^2$",
    "\u2028",
    "\n",
    " the",
    " the",
    "",
    "\x00\x1b[31m",
    "日本\u202e",
    "\ud800",
]
