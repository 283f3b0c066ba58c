"""The continuation of one prompt: its ids, its growing text, and whether a stop was reached."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from hooklens.core.errors import InputError, WrongType

#: Given the number of the prompt and the next piece of its text.
OnPiece = Callable[[int, str], None]
# The last tokens of the prompt are decoded with the new ones: a leading space can depend on them.
_CONTEXT = 8


@dataclass(frozen=True)
class Stops:
    """The stops of a continuation: a token of `ids`, or one of `texts` anywhere in the new text.

    >>> Stops.of([5, "END"], None)
    Stops(ids=frozenset({5}), texts=('END',))
    """

    ids: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, stop: int | str | Collection[int | str] | None, tokenizer: Any) -> "Stops":
        """From ids and strings. None means the tokenizer's end of text; an empty sequence never stops."""
        if stop is None:
            ids = {*getattr(tokenizer, "stop_ids", ()), getattr(tokenizer, "eos_id", None)} - {None}
            return cls(frozenset(ids))
        given = list(stop) if isinstance(stop, Collection) and not isinstance(stop, str) else [stop]
        wrong = [item for item in given if isinstance(item, bool) or not isinstance(item, int | str)]
        if wrong:
            raise WrongType(f"stop takes token ids and strings, got {wrong[0]!r}; give one or a list of these")
        if "" in given:
            raise InputError("stop contains the empty string, which occurs in every text; stop=() never stops")
        return cls(frozenset(s for s in given if isinstance(s, int)), tuple(s for s in given if isinstance(s, str)))


class Continuation:
    """The new tokens of one prompt, and their text, emitted in pieces of whole characters.

    >>> from hooklens.pretrained.tokenizer import tiny_tokenizer
    >>> tokenizer, pieces = tiny_tokenizer(), []
    >>> row = Continuation(tokenizer.to_tokens("a")[0], tokenizer, Stops(texts=("!",)), pieces.append)
    >>> for token in tokenizer.encode("bü!c"): row.add(token)
    >>> pieces, row.text(), row.stopped
    (['b', 'ü'], 'bü', True)
    """

    def __init__(
        self, prompt: Int[Tensor, "pos"], tokenizer: Any, stops: Stops, emit: Callable[[str], None] | None = None
    ):
        self.prompt, self.tokenizer, self.stops, self.emit = prompt, tokenizer, stops, emit
        self.ids: list[int] = []
        self.stopped, self.shown = False, 0
        if tokenizer is None and emit is not None:
            raise InputError(
                "stream= emits text, which needs a tokenizer, but this model has none; leave stream out and read "
                "the result's new_tokens, or give the model one: hl.load(..., tokenizer=...)"
            )
        if tokenizer is None and stops.texts:
            raise InputError(
                f"the stop text {stops.texts[0]!r} needs a tokenizer, which this model does not have; stop on token "
                "ids instead"
            )

    def add(self, token: int) -> None:
        """Append a token, unless a stop was reached."""
        if self.stopped:
            return
        self.ids.append(token)
        self.stopped = token in self.stops.ids
        if self.stops.texts and not self.stopped:
            decoded = self._decoded()
            self.stopped = any(stop in decoded for stop in self.stops.texts)
        if self.emit is not None:
            text = self.text()
            self._show(text if self.stopped else text[: self._settled(text)])

    def text(self) -> str:
        """The new text, without the stop that ended it."""
        text = self._decoded()
        return text[: min([text.index(stop) for stop in self.stops.texts if stop in text], default=None)]

    def finish(self) -> None:
        """Emit the rest of the text."""
        if self.emit is not None:
            self._show(self.text())

    def _decoded(self) -> str:
        ids = self.ids[:-1] if self.ids and self.ids[-1] in self.stops.ids else self.ids
        context = self.prompt[-_CONTEXT:].tolist()
        before, whole = self.tokenizer.to_string(context), self.tokenizer.to_string([*context, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.to_string(ids)

    def _settled(self, text: str) -> int:
        """The length of the text that is final: without half a character or the beginning of a stop text."""
        end = len(text.rstrip("\ufffd"))
        starts = (stop[:n] for stop in self.stops.texts for n in range(1, len(stop)))
        return end - max([len(start) for start in starts if text[:end].endswith(start)], default=0)

    def _show(self, text: str) -> None:
        if self.emit is not None and len(text) > self.shown:
            self.emit(text[self.shown :])
            self.shown = len(text)
