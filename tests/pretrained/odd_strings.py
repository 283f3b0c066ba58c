"""Strings that tokenizers get wrong, for comparing two of them."""

import random

PIECES = [
    "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \t ", " \n", "\n ", "\u00a0", "\u2009",
    "\u3000", "\u200b", "\u200d", "\ufeff", "\x00", "\x01", "\x1b[0m", "\x7f", "\x85", "\ufffd",
    "a", " a", "A", "the", " the", "The", " THE", "don't", "DON'T", "we'll", "I'd", "’s", "'S",
    "0", "7", " 7", "12", "123", "1234567", " 3.14159", "1,000,000", "1e-5", "0x1F", "٣٤٥", "½",
    "²", "Ⅷ", "①", "一二三", "naïve", "nai\u0308ve", "e\u0301", "\u0301", "ñ", "n\u0303", "Å", "ﬁ",
    "ß", "ǅ", "Привет", "مرحبا", "שלום", "नमस्ते", "สวัสดี", "한국어", "ㅎㅏㄴ", "你好", "世界。",
    "日本語テキスト", "🙂", "👩‍👩‍👧‍👦", "🇨🇭", "👍🏽", "𝔘𝔫𝔦", "\U000e0001", "def f(x):\n    return x**2",
    "{'a': [1, 2]}", "</div>", "x = y if z else w;", "//", "/* c */", "#!/bin/sh",
    "http://a.b/c?d=e&f=g", "a@b.co", "...", "!!!", "?!", "--", "—", "“quoted”", "$5", "€10",
    "50%", "C++", "snake_case", "camelCase", "HTTPServer", "ALLCAPS", "ααα", "<|endoftext|>",
    "<|im_end|>", " <s> ", "</s>", "<unk>", "<0x41>", "<bos>", "▁", "▁a", "Ġ", "Ċ", "Ġthe",
    "When Mary and John went to the store,", " " * 17, "a" * 40, "ab" * 20,
]  # fmt: skip


def odd_strings(n: int = 300, seed: int = 0) -> list[str]:
    """Each piece alone, then random joins of two to six of them; the same list every time."""
    generator = random.Random(seed)
    joined = ["".join(generator.choices(PIECES, k=generator.randint(2, 6))) for _ in range(n - len(PIECES))]
    return PIECES + joined
