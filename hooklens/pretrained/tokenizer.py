"""Text to tokens and back: a small wrapper around the `tokenizers` library in which nothing is added silently."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, overload

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooklens.core.errors import InputError, WrongType
from hooklens.core.files import make_folder, write_atomically

Tokens = Int[Tensor, "batch pos"]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """What turns text into token ids for one model.

    `default_prepend_bos` says whether the model was trained with a BOS token in front. It is the only token that
    `to_tokens` ever adds, and only there; the text of a special token (`<|im_end|>`) is read as that token.

    >>> tokenizer = tiny_tokenizer("he llo", extra=("<bos>",))
    >>> tokenizer.to_tokens("hello hello")
    tensor([[256, 258, 220, 256, 258]])
    >>> tokenizer.to_str_tokens("hello 🙂", prepend_bos=True)
    ['<bos>', 'he', 'llo', ' ', '�', '�', '�', '�']
    >>> tokenizer.to_string(tokenizer.to_tokens("hello 🙂"))
    ['hello 🙂']
    """

    backend: Any = field(repr=False)  # a tokenizers.Tokenizer, used read-only
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    default_prepend_bos: bool = False
    chat_template: str | None = field(default=None, repr=False)
    stop_ids: tuple[int, ...] = ()  # every token that ends a reply; some instruct models have several

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """From a Hugging Face folder: tokenizer.json, and what the settings files beside it say."""
        from hooklens.pretrained.tokenizer_files import read_folder

        return cls(**read_folder(Path(folder)))

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any]) -> "Tokenizer":
        """Rebuilt from the `tokenizer.ggml.*` metadata of a GGUF file."""
        from hooklens.pretrained.gguf_tokenizer import rebuild

        return cls(**rebuild(metadata))

    @classmethod
    def from_transformers(cls, tokenizer: Any) -> "Tokenizer":
        """From an in-memory transformers tokenizer, which is copied."""
        from hooklens.pretrained.tokenizer_files import read_transformers

        return cls(**read_transformers(tokenizer))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tokenizer":
        return self  # nothing in it changes; copying a large vocabulary takes longer than copying a small model

    @property
    def vocab_size(self) -> int:
        """How many tokens it knows; the model may have more rows than that, for padding."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for something other than text."""
        added = self.backend.get_added_tokens_decoder()
        named = (self.bos_id, self.eos_id, self.pad_id, self.unk_id, *self.stop_ids)
        return frozenset(i for i, token in added.items() if token.special) | {i for i in named if i is not None}

    def encode(self, text: str) -> list[int]:
        """The ids of a text and nothing else: no BOS, and none for the empty text."""
        if not isinstance(text, str):
            raise WrongType(f"a text must be a str, got {type(text).__name__}; give a str or a list of str")
        half = next((at for at, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
        if half is not None:
            raise InputError(
                f"the text holds {text[half]!r} at {half}, half of a surrogate pair, which is no character; decode the "
                "bytes it came from as UTF-8"
            )
        return self.backend.encode(text, add_special_tokens=False).ids

    @overload
    def to_tokens(
        self,
        text: str | Sequence[str],
        *,
        prepend_bos: bool | None = ...,
        padding_side: Literal["left", "right"] = ...,
        return_mask: Literal[False] = ...,
        device: torch.device | str | None = ...,
    ) -> Tokens: ...

    @overload
    def to_tokens(
        self,
        text: str | Sequence[str],
        *,
        prepend_bos: bool | None = ...,
        padding_side: Literal["left", "right"] = ...,
        return_mask: Literal[True],
        device: torch.device | str | None = ...,
    ) -> tuple[Tokens, Bool[Tensor, "batch pos"]]: ...

    def to_tokens(
        self,
        text: str | Sequence[str],
        *,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] = "right",
        return_mask: bool = False,
        device: torch.device | str | None = None,
    ) -> Tokens | tuple[Tokens, Bool[Tensor, "batch pos"]]:
        """Token ids of one text or of several, as one tensor.

        `prepend_bos=None` does what the model was trained with, once: a text that begins with BOS already (as chat
        templates write it) gets no second one. True always adds it, False never. Shorter rows are padded; the mask
        is False there.
        """
        if padding_side not in ("left", "right"):
            raise InputError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise InputError("to_tokens got an empty list; give at least one text")
        numbers = [""] if isinstance(text, str) else [f" (number {index})" for index in range(len(texts))]
        rows = [self._row(one, prepend_bos, number) for one, number in zip(texts, numbers, strict=True)]
        longest = max(map(len, rows))
        pad = next((i for i in (self.pad_id, self.eos_id) if i is not None), 0)
        tokens = torch.full((len(rows), longest), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.bool)
        for i, row in enumerate(rows):
            where = slice(longest - len(row), None) if padding_side == "left" else slice(0, len(row))
            tokens[i, where] = torch.tensor(row)
            mask[i, where] = True
        return (tokens.to(device), mask.to(device)) if return_mask else tokens.to(device)

    def _row(self, text: str, prepend_bos: bool | None, number: str = "") -> list[int]:
        ids = self.encode(text)
        if prepend_bos and self.bos_id is None:
            raise InputError(
                "prepend_bos=True, but this tokenizer has no BOS token; leave it out, or write a token into the text"
            )
        wanted = self.default_prepend_bos and ids[:1] != [self.bos_id] if prepend_bos is None else prepend_bos
        if wanted and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        if not ids:
            raise InputError(
                f"the prompt {text!r}{number} is empty: it gives no tokens; give some text, or "
                "prepend_bos=True for a model that has a BOS token"
            )
        return ids

    def to_string(self, tokens: Int[Tensor, "*shape"] | Sequence[int] | Sequence[Sequence[int]] | int) -> Any:
        """The text of token ids: a str for one sequence, a list of str for a batch. Special tokens are spelled out."""
        ids: Any = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        if isinstance(ids, int):
            ids = [ids]
        if len(ids) and not isinstance(ids[0], int):
            return [self.to_string(row) for row in ids]
        self._check(ids)
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def to_str_tokens(
        self, tokens: str | Int[Tensor, "*shape"] | Sequence[int], *, prepend_bos: bool | None = None
    ) -> list[str]:
        """One string a token, the leading space included, for one text or one sequence of ids.

        A character that is split over several tokens shows as � in each of them.
        """
        if isinstance(tokens, str):
            tokens = self._row(tokens, prepend_bos)
        ids: Any = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        if len(ids) == 1 and isinstance(ids[0], list):
            ids = ids[0]
        if ids and isinstance(ids[0], list):
            raise InputError(f"to_str_tokens takes one sequence, got a batch of {len(ids)}; call it on each row")
        self._check(ids)
        return [self._spelling(i) for i in ids]

    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token.

        >>> tiny_tokenizer("he llo").to_single_token("hello")
        Traceback (most recent call last):
        hooklens.core.errors.InputError: 'hello' is 2 tokens ['he', 'llo'], one is needed; use 'he', its first, or a
        word that is one token
        """
        ids = self.encode(text)
        if len(ids) == 1:
            return ids[0]
        # SentencePiece tokenizers put a space of their own in front, so that ' Mary' is two tokens to them although
        # the vocabulary holds it.
        spelled = None if self._byte_level else self.backend.token_to_id(text.replace(" ", "▁"))
        if spelled is not None:
            return spelled
        if not ids:
            raise InputError(f"{text!r} is no token at all; give a word, often with a leading space: ' Mary'")
        pieces = [self._spelling(i) for i in ids]
        raise InputError(
            f"{text!r} is {len(ids)} tokens {pieces}, one is needed; use {pieces[0]!r}, its first, or a word "
            "that is one token"
        )

    def apply_chat_template(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as the text that an instruct model was trained on; give it to `to_tokens`."""
        from hooklens.pretrained.chat import render

        if self.chat_template is None:
            raise InputError("this tokenizer has no chat template; instruct models have one, others take plain text")
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "unk": self.unk_id}
        named = {f"{name}_token": self.backend.id_to_token(i) for name, i in ids.items() if i is not None}
        return render(self.chat_template, messages, add_generation_prompt=add_generation_prompt, **named)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `from_folder` and transformers read."""
        folder = make_folder(folder)
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "unk": self.unk_id}
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.default_prepend_bos,
            "stop_token_ids": list(self.stop_ids),
        }
        config |= {f"{name}_token": self.backend.id_to_token(i) for name, i in ids.items() if i is not None}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        written = {"tokenizer.json": self.backend.to_str()}
        written["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False)
        for name, text in written.items():
            with write_atomically(folder / name) as aside:
                aside.write_text(text, encoding="utf-8")

    @cached_property
    def _byte_level(self) -> bool:
        decoder = self.backend.decoder
        return decoder is not None and b"ByteLevel" in decoder.__getstate__()

    @cached_property
    def _added(self) -> dict[int, str]:
        return {i: token.content for i, token in self.backend.get_added_tokens_decoder().items()}

    def _check(self, ids: Sequence[int]) -> None:
        size = self.vocab_size  # ids may have gaps, so that a few valid ones lie above
        bad = next((i for i in ids if i < 0 or (i >= size and self.backend.id_to_token(i) is None)), None)
        if bad is not None:
            raise InputError(f"{bad} is no token id; this tokenizer's ids go from 0 to {size - 1}")

    def _spelling(self, token: int) -> str:
        """What a token adds to the text, its leading space included, which `decode` of one token may strip."""
        if token in self._added:
            return self._added[token]
        piece = self.backend.id_to_token(token)
        if piece is None:
            return "�"
        if self._byte_level:
            values = byte_values()
            if all(letter in values for letter in piece):
                return bytes(values[letter] for letter in piece).decode("utf-8", "replace")
            return piece
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)]).decode("utf-8", "replace")
        return piece.replace("▁", " ")


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


def tiny_tokenizer(words: str = "", extra: Sequence[str] = ()) -> Tokenizer:
    """A byte-level tokenizer that knows every byte and a few words, for examples and tests.

    `extra` are special tokens; the first of them is BOS.

    >>> tiny_tokenizer("the").to_str_tokens("the cat")
    ['the', ' ', 'c', 'a', 't']
    """
    import tokenizers

    letters = sorted(byte_values())
    pieces, merges = list(letters), []
    for word in words.split():
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    model = tokenizers.models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(extra))
    return Tokenizer(backend, bos_id=backend.token_to_id(extra[0]) if extra else None)
