"""Text to tokens and back: a thin wrapper around the `tokenizers` library that adds nothing silently."""

import itertools
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Integer
from torch import Tensor

from hooklens.core.arguments import path_of
from hooklens.core.errors import InputError, WrongType
from hooklens.core.files import make_folder, write_atomically
from hooklens.pretrained.byte_letters import byte_values, in_byte_alphabet, in_letters
from hooklens.pretrained.chat import render
from hooklens.pretrained.gguf_tokenizer import rebuild
from hooklens.pretrained.tokenizer_files import read_folder, read_transformers


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Convert text to token ids and back, for one model.

    `default_prepend_bos` says whether the model was trained with a BOS token in front. BOS is the only token that is
    ever added, and only by `to_tokens`. The text of a special token (`<|im_end|>`) is read as that token.

    >>> tokenizer = tiny_tokenizer("he llo", extra=("<bos>",))
    >>> tokenizer.to_tokens("hello hello")
    tensor([[256, 258, 220, 256, 258]])
    >>> tokenizer.to_str_tokens("hello 🙂", prepend_bos=True)
    ['<bos>', 'he', 'llo', ' ', '�', '�', '�', '�']
    >>> tokenizer.to_string(tokenizer.to_tokens("hello 🙂"))
    ['hello 🙂']
    """

    backend: Any = field(repr=False)  # a tokenizers.Tokenizer, never modified
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    default_prepend_bos: bool = False
    chat_template: str | None = field(default=None, repr=False)
    stop_ids: tuple[int, ...] = ()  # all tokens that end a reply; some instruct models have several

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read a Hugging Face folder: tokenizer.json and the settings files next to it."""
        return cls(**read_folder(path_of(folder, "folder")))

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any]) -> "Tokenizer":
        """Rebuild the tokenizer from the `tokenizer.ggml.*` metadata of a GGUF file."""
        return cls(**rebuild(metadata))

    @classmethod
    def from_transformers(cls, tokenizer: Any) -> "Tokenizer":
        """Copy an in-memory transformers tokenizer."""
        return cls(**read_transformers(tokenizer))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tokenizer":
        return self  # immutable; copying a large vocabulary takes longer than copying a small model

    @property
    def vocab_size(self) -> int:
        """The number of tokens; the model may have more rows, for padding."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that do not stand for text."""
        added = self.backend.get_added_tokens_decoder()
        named = (self.bos_id, self.eos_id, self.pad_id, self.unk_id, *self.stop_ids)
        return frozenset(i for i, token in added.items() if token.special) | {i for i in named if i is not None}

    def encode(self, text: str) -> list[int]:
        """The ids of a text only: no BOS, and an empty list for the empty text."""
        if not isinstance(text, str):
            raise WrongType(f"a text must be a str, got {type(text).__name__}; give a str or a list of str")
        half = next((at for at, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
        if half is not None:
            raise InputError(
                f"the text contains {text[half]!r} at {half}, half of a surrogate pair, which is not a character; "
                "decode the original bytes as UTF-8"
            )
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the package raises no narrower class for a word that it does not know
            raise self._unreadable(text, error) from error

    def _unreadable(self, text: str, error: Exception) -> InputError:
        """The error for a text that a vocabulary without a token for unknown words cannot write."""
        known, split = self.backend.get_vocab(), self.backend.pre_tokenizer
        words = [text] if split is None else [word for word, _ in split.pre_tokenize_str(text)]
        odd = next((word for word in words if word not in known), None)
        if odd is None:
            return InputError(f"the tokenizer cannot read this text ({error}); give another text")
        shown = f"{', '.join(map(repr, sorted(known)[:12]))}{' ...' if len(known) > 12 else ''}"
        return InputError(
            f"the text holds {odd!r:.40}, which is none of the {len(known)} tokens of this vocabulary ({shown}); leave "
            "it out, or train on a text that has it"
        )

    def to_tokens(
        self,
        text: str | Sequence[str],
        *,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] = "right",
        return_mask: bool = False,
        device: torch.device | str | None = None,
    ) -> Any:
        """Convert one text or several to token ids `[batch pos]`; with `return_mask`, to (ids, mask).

        `prepend_bos=None` follows the model's training and adds BOS at most once: a text that already begins with BOS
        (as from a chat template) gets no second one. True always adds BOS, False never. Shorter rows are padded; the
        mask is False there.
        """
        if padding_side not in ("left", "right"):
            raise InputError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise InputError("to_tokens got an empty list; give at least one text")
        numbers = [""] if isinstance(text, str) else [f" (number {index})" for index in range(len(texts))]
        rows = [self._row(part, prepend_bos, number) for part, number in zip(texts, numbers, strict=True)]
        longest = max(map(len, rows))
        tokens = torch.full((len(rows), longest), self._padding, dtype=torch.long)
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
                "prepend_bos=True, but this tokenizer has no BOS token; leave it out, or write the token into the text"
            )
        wanted = self.default_prepend_bos and ids[:1] != [self.bos_id] if prepend_bos is None else prepend_bos
        if wanted and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        if not ids:
            raise InputError(
                f"the prompt {text!r}{number} is empty: it has no tokens; give some text, or "
                "prepend_bos=True for a model with a BOS token"
            )
        return ids

    def padding_within(self, d_vocab: int) -> "Tokenizer":
        """This tokenizer, padding with a token within the model's vocabulary (an added one may lie outside)."""
        if self._padding < d_vocab:
            return self
        return replace(self, pad_id=self.eos_id if self.eos_id is not None and self.eos_id < d_vocab else 0)

    @property
    def _padding(self) -> int:
        return next((i for i in (self.pad_id, self.eos_id) if i is not None and self._knows(i)), 0)

    def to_string(
        self, tokens: Integer[Tensor, "*shape"] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor] | int
    ) -> Any:
        """Convert token ids to text: a str for one sequence, a list of str for a batch. Special tokens are spelled out.

        A model may have rows for tokens that the tokenizer does not know: such a token is written `<49160>`.
        """
        ids = _listed(tokens)
        if isinstance(ids, int):
            ids = [ids]
        if len(ids) and not isinstance(ids[0], int):
            return [self.to_string(row) for row in ids]
        self._check(ids)
        texts = []
        for known, group in itertools.groupby(ids, key=self._knows):
            run = list(group)
            texts.append(self._decode(run) if known else "".join(map(self._spelling, run)))
        return "".join(texts)

    def _decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)

    def to_str_tokens(
        self, tokens: str | Integer[Tensor, "*shape"] | Sequence[int], *, prepend_bos: bool | None = None
    ) -> list[str]:
        """One string per token, including its leading space, for one text or one sequence of ids.

        A character that is split over several tokens is shown as � in each of them.
        """
        if isinstance(tokens, str):
            tokens = self._row(tokens, prepend_bos)
        ids = _listed(tokens)
        ids = [ids] if isinstance(ids, int) else ids
        if len(ids) == 1 and isinstance(ids[0], list):
            ids = ids[0]
        if ids and isinstance(ids[0], list):
            raise InputError(f"to_str_tokens takes one sequence, got a batch of {len(ids)}; call it on each row")
        self._check(ids)
        return [self._spelling(i) for i in ids]

    def find_token(self, text: str) -> int | None:
        """The id of the token with exactly this text, including a leading space; None if there is none.

        >>> tokenizer = tiny_tokenizer("he")
        >>> tokenizer.find_token("he"), tokenizer.find_token("hello")
        (256, None)
        """
        ids = self.encode(text)
        spelled = [self._spelling(i) for i in ids]
        spaced = bool(ids) and spelled[0].startswith(" ") and not text.startswith(" ")
        if len(ids) == 1 and not spaced:
            return ids[0] if ids[0] != self.unk_id or spelled == [text] else None
        # SentencePiece tokenizers add a leading space, so 'Mary' is read as ' Mary', and ' Mary' as two tokens. For
        # these, look the text up in the vocabulary.
        return self.backend.token_to_id(self._piece(text)) if spaced or not self._byte_level else None

    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token. ' Mary' is the token after another word, 'Mary' the token at the
        start, even where the tokenizer reads both alike at the beginning of a text.

        >>> tiny_tokenizer("he llo").to_single_token("hello")
        Traceback (most recent call last):
        hooklens.core.errors.InputError: 'hello' is 2 tokens ['he', 'llo'], one is needed; use 'he', its first, or a
        word that is one token
        """
        token = self.find_token(text)
        if token is not None:
            return token
        ids = self.encode(text)
        if not ids:
            raise InputError(f"{text!r} has no tokens; give a word, often with a leading space: ' Mary'")
        pieces = [self._spelling(i) for i in ids]
        if len(ids) == 1:
            raise InputError(
                f"the vocabulary has no token {text!r} and reads it as {pieces[0]!r}; use that, or a word that is one "
                "token"
            )
        raise InputError(
            f"{text!r} is {len(ids)} tokens {pieces}, one is needed; use {pieces[0]!r}, its first, or a word "
            "that is one token"
        )

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Format a conversation as the text that an instruct model was trained on; pass the result to `to_tokens`.

        `variables` are further inputs of the model's template: `{"enable_thinking": False}`, `{"tools": [...]}`.
        """
        if self.chat_template is None:
            raise InputError("this tokenizer has no chat template; instruct models have one; others take plain text")
        return render(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            tokens=self._named_tokens(),
            variables=variables,
        )

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json; `from_folder` and transformers read them."""
        folder = make_folder(folder)
        for name, text in self.files().items():
            with write_atomically(folder / name) as aside:
                aside.write_text(text, encoding="utf-8")

    def files(self) -> dict[str, str]:
        """The text of each file that `save` writes."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "stop_token_ids": list(self.stop_ids)}
        config |= self._named_tokens()
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        settings = json.dumps(config, indent=2, ensure_ascii=False)
        return {"tokenizer.json": self._with_bos_rule().to_str(), "tokenizer_config.json": settings}

    def _with_bos_rule(self) -> Any:
        """The backend, set to add BOS as `default_prepend_bos` says: readers of tokenizer.json rely on it."""
        from tokenizers import Tokenizer as Backend
        from tokenizers.processors import TemplateProcessing

        adds = self.bos_id is not None and self.backend.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]
        if adds == (self.default_prepend_bos and self.bos_id is not None):
            return self.backend
        backend, bos = Backend.from_str(self.backend.to_str()), self.backend.id_to_token(self.bos_id)
        single, special = (f"{bos}:0 $A:0", [(bos, self.bos_id)]) if self.default_prepend_bos else ("$A:0", [])
        backend.post_processor = TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=special)
        return backend

    def _named_tokens(self) -> dict[str, str]:
        """The texts of the special tokens, as settings files call them: bos_token, eos_token, ..."""
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "unk": self.unk_id}
        return {f"{name}_token": self.backend.id_to_token(i) for name, i in ids.items() if i is not None}

    @cached_property
    def _byte_level(self) -> bool:
        decoder = self.backend.decoder
        return decoder is not None and b"ByteLevel" in decoder.__getstate__()

    @cached_property
    def _added(self) -> dict[int, str]:
        return {i: token.content for i, token in self.backend.get_added_tokens_decoder().items()}

    def _check(self, ids: Sequence[int]) -> None:
        if any(isinstance(i, list) for i in ids):
            raise InputError("tokens must be one sequence of ids or several, got a mixture of both")
        bad = next((i for i in ids if not 0 <= i < 2**31), None)
        if bad is not None:
            raise InputError(f"{bad} is not a token id; this tokenizer's ids are 0 to {self.vocab_size - 1}")

    def _knows(self, token: int) -> bool:
        # ids may have gaps, so a few valid ids exceed the size
        return 0 <= token < self.vocab_size or (0 <= token < 2**32 and self.backend.id_to_token(token) is not None)

    def _piece(self, text: str) -> str:
        """The vocabulary's spelling of a text."""
        return in_letters(text) if self._byte_level else text.replace(" ", "▁")

    def _spelling(self, token: int) -> str:
        """The text that a token adds, including its leading space, which `decode` of a single token may strip."""
        if token in self._added:
            return self._added[token]
        piece = self.backend.id_to_token(token)
        if piece is None:
            return f"<{token}>"
        if self._byte_level:
            if not in_byte_alphabet(piece):
                return piece
            return bytes(byte_values()[letter] for letter in piece).decode("utf-8", "replace")
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)]).decode("utf-8", "replace")
        return piece.replace("▁", " ")


def _listed(tokens: Any) -> Any:
    """Convert ids of any integer type, single or in nested lists, to Python integers."""
    ids = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    if isinstance(ids, list | tuple):
        return [_listed(row) for row in ids]
    try:
        return operator.index(ids)
    except TypeError as error:
        raise WrongType(f"tokens must be integers, in one sequence or in several, got {tokens!r:.60}") from error


def tiny_tokenizer(words: str = "", extra: Sequence[str] = ()) -> Tokenizer:
    """A byte-level tokenizer with every byte and a few words, for examples and tests.

    `extra` lists special tokens; the first of them is BOS.

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
