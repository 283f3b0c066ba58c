"""A tokenizer rebuilt from a GGUF file's metadata, equivalent to the model's own tokenizer.json.

The file stores the vocabulary, merges or scores, and two names: `tokenizer.ggml.model` ("gpt2": byte-level BPE,
"llama": SentencePiece BPE) and `tokenizer.ggml.pre`, which says how text is split before merging. transformers knows
some of the latter and silently splits like GPT-2 for the others (for example smollm, which splits off single digits).
Here each known name has its rule, and an unknown name raises an error.

Reference: llama.cpp's `llama-vocab.cpp` for the names; the tokenizer.json of each model for its rule.
"""

from dataclasses import dataclass
from typing import Any

from hooklens.core.errors import FileRefused
from hooklens.core.files import reading
from hooklens.pretrained.byte_letters import in_byte_alphabet, in_letters

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_LONGEST_TOKEN = 1024  # characters; SentencePiece's usual limit is 16, runs of spaces in others reach 512
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str, digits: str) -> str:
    """The rule of Tekken and GPT-4o: words are split where lower case meets upper case."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}"
    return words + rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _TAIL


@dataclass(frozen=True)
class Split:
    """How text is split before merging: the expression (default GPT-2's), single digits first, Unicode composition."""

    pattern: str | None = None
    digits: bool = False
    compose: bool = False
    whole_words: bool = False  # a piece in the vocabulary becomes one token, whatever the merges
    bos: bool = False  # whether to add BOS if the file does not say


PRE_TOKENIZERS: dict[str, Split] = {
    "default": Split(),
    "gpt-2": Split(),
    "mpt": Split(),
    "olmo": Split(compose=True),  # also Pythia's
    "smollm": Split(digits=True),
    "starcoder": Split(digits=True),
    "refact": Split(digits=True),
    "llama-bpe": Split(_LLAMA3, whole_words=True, bos=True),
    "llama3": Split(_LLAMA3, whole_words=True, bos=True),
    "llama-v3": Split(_LLAMA3, whole_words=True, bos=True),
    "dbrx": Split(_LLAMA3),
    "smaug-bpe": Split(_LLAMA3),
    "qwen2": Split(_QWEN2, compose=True),
    "deepseek-r1-qwen": Split(_QWEN2, compose=True),
    "tekken": Split(_cased("", r"\p{N}"), whole_words=True, bos=True),
    "gpt-4o": Split(_cased(_CONTRACTION + "?", r"\p{N}{1,3}")),
}


def rebuild(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of Tokenizer from a GGUF file's metadata."""
    with reading(str(metadata.get("general.name", "GGUF metadata")), "a tokenizer"):
        vocabulary = _Vocabulary(metadata)
        kind, ids, get = vocabulary.need("model"), vocabulary.ids, vocabulary.ggml.get
        if kind not in ("gpt2", "llama"):
            raise FileRefused(
                f"the file's tokenizer has the type {kind!r}; supported types: 'gpt2' (byte-level BPE) and "
                "'llama' (SentencePiece BPE); load the tokenizer from a folder instead"
            )
        backend = vocabulary.byte_level() if kind == "gpt2" else vocabulary.sentencepiece()
        vocabulary.add_special(backend)
        # Older files have no flag: llama.cpp adds BOS to SentencePiece vocabularies, and where the split rule says so.
        usual = kind == "llama" or vocabulary.split().bos
        return {
            "backend": backend,
            **{f"{name}_id": i for name, i in ids.items()},
            "default_prepend_bos": ids["bos"] is not None and bool(get("add_bos_token", usual)),
            "chat_template": metadata.get("tokenizer.chat_template"),
            "stop_ids": tuple(dict.fromkeys(i for i in (ids["eos"], get("eot_token_id")) if i is not None)),
        }


class _Vocabulary:
    """The `tokenizer.ggml` metadata of a file, and the parts of a tokenizer that are made of it.

    Long tokens are refused: a token has as many splits as characters, and each costs time in proportion to its length.
    """

    def __init__(self, metadata: dict[str, Any]) -> None:
        prefix = "tokenizer.ggml."
        self.arch = metadata.get("general.architecture", "")
        self.ggml = {k.removeprefix(prefix): value for k, value in metadata.items() if k.startswith(prefix)}
        self.tokens: list[str] = self.need("tokens")
        self.types: list[int] = self.ggml.get("token_type") or [1] * len(self.tokens)
        self.ids: dict[str, int | None] = {
            name: self.ggml.get(f"{theirs}_token_id")
            for name, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        }
        if (longest := max(map(len, self.tokens), default=0)) > _LONGEST_TOKEN:
            raise FileRefused(
                f"the file's vocabulary has a token of {longest:,} characters (the limit is {_LONGEST_TOKEN:,}); "
                "convert it again"
            )

    def need(self, key: str) -> Any:
        if key not in self.ggml:
            raise FileRefused(
                f"the file has no tokenizer.ggml.{key}, which is needed to rebuild its tokenizer; it has "
                f"{', '.join(self.ggml) or 'no tokenizer at all'}; load the tokenizer from a folder instead"
            )
        return self.ggml[key]

    def split(self) -> Split:
        """The file's rule for splitting text. If the file names none, only GPT-2 itself splits like GPT-2."""
        name = self.ggml.get("pre", "gpt-2" if self.arch == "gpt2" else None)
        if name not in PRE_TOKENIZERS:
            seen = "does not say how it splits text" if name is None else f"splits text as {name!r}, an unknown rule"
            raise FileRefused(
                f"the file's tokenizer {seen} (tokenizer.ggml.pre); known: {', '.join(PRE_TOKENIZERS)}; convert the "
                "file again with a newer llama.cpp, or, in Python, pass another tokenizer as load(path, "
                "tokenizer=folder)"
            )
        return PRE_TOKENIZERS[name]

    def byte_level(self) -> Any:
        """Byte-level BPE: every byte is a letter; text is split by the file's rule and merged within pieces."""
        from tokenizers import Regex, decoders, normalizers, pre_tokenizers

        split, vocab = self.split(), {}
        for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            # Some converters write added words as plain text; merged tokens always use the byte alphabet.
            plain = kind in (_CONTROL, _USER_DEFINED) or in_byte_alphabet(token)
            vocab[token if plain else in_letters(token)] = i
        backend = _model(vocab, _merges(self.need("merges")), len(self.tokens), ignore_merges=split.whole_words)
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
        if split.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.ByteLevel()
        if split.compose:
            backend.normalizer = normalizers.NFC()
        return backend

    def sentencepiece(self) -> Any:
        """SentencePiece BPE: spaces are `▁`; text outside the vocabulary falls back to bytes.

        The rule for the space in front of a text depends on the model and is not in the file: Gemma adds none, Phi-3
        adds one before every stretch of text, the others before the first.
        """
        from tokenizers import decoders, normalizers, pre_tokenizers

        gemma = self.arch.startswith("gemma")
        # Gemma's runs of spaces are stored as spaces; its merges use runs of `▁`.
        tokens = ["▁" * len(t) if gemma and t and not t.strip(" ") else t for t in self.tokens]
        vocab = {token: i for i, token in enumerate(tokens)}
        unk = None if self.ids["unk"] is None else tokens[self.ids["unk"]]
        merges = self._sentencepiece_merges(tokens, vocab, by_position=gemma)
        backend = _model(vocab, merges, len(tokens), fuse_unk=True, byte_fallback=True, unk_token=unk)
        prefix = self.ggml.get("add_space_prefix", True) and not gemma
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if prefix:
            steps.append(decoders.Strip(content=" ", left=1))
        backend.decoder = decoders.Sequence(steps)
        if gemma:
            backend.normalizer = normalizers.Replace(" ", "▁")
            backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        elif self.arch == "phi3" and prefix:
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            scheme = "first" if prefix else "never"
            backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        return backend

    def _sentencepiece_merges(
        self, tokens: list[str], vocab: dict[str, int], *, by_position: bool
    ) -> list[tuple[str, str]]:
        """The merges of a SentencePiece vocabulary, best first: every way to join two tokens into another token.

        SentencePiece stores no merges; it joins the pair whose result has the highest score. For Gemma the order of the
        tokens, not their score, gives the order of merges. Ties: the longer left part, then the longer right part.
        """
        if "merges" in self.ggml:
            return _merges(self.ggml["merges"])
        scores = [-i for i in range(len(tokens))] if by_position else self.need("scores")
        merges = []
        for i, token in enumerate(tokens):
            parts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            known = [(left, right) for left, right in parts if left in vocab and right in vocab]
            known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
            merges += [(-scores[i], -len(left), -len(right), left, right) for left, right in known]
        merges.sort(key=lambda merge: merge[:3])
        return [(left, right) for *_, left, right in merges]

    def add_special(self, backend: Any) -> None:
        """Register tokens that are matched whole: control tokens, named special tokens, and user-defined words."""
        from tokenizers import AddedToken

        for name, i in {**self.ids, "eot": self.ggml.get("eot_token_id")}.items():
            if i is not None and not (type(i) is int and 0 <= i < len(self.tokens)):
                raise FileRefused(
                    f"the file's {name}_token_id = {i!r:.40} lies outside its vocabulary of {len(self.tokens)}; "
                    "convert it again"
                )
        special, plain = [], []
        for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind == _CONTROL or i in self.ids.values():
                special.append(AddedToken(token, normalized=False, special=True))
            elif kind == _USER_DEFINED and backend.token_to_id(token) is not None:
                plain.append(AddedToken(token, normalized=False))
        backend.add_special_tokens(special)
        backend.add_tokens(plain)


def _model(vocab: dict[str, int], merges: list[tuple[str, str]], size: int, **options: Any) -> Any:
    from tokenizers import Tokenizer, models

    if len(vocab) != size:
        raise FileRefused(f"the file's vocabulary has {size} entries, only {len(vocab)} distinct; convert it again")
    try:
        return Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the library raises a bare Exception
        raise FileRefused(f"the file's merges do not match its vocabulary: {error}; convert it again") from error


def _merges(lines: list[str]) -> list[tuple[str, str]]:
    pairs = [tuple(line.split(" ")) for line in lines]
    bad = next((i for i, pair in enumerate(pairs) if len(pair) != 2), None)
    if bad is not None:
        raise FileRefused(f"merge {bad} of the file is {lines[bad]!r}; expected two tokens with a space between")
    return pairs  # type: ignore[return-value]
