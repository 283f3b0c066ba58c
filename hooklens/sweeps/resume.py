"""Finished bins of a sweep, on disk: an interrupted sweep goes on where it stopped, if it is the same sweep."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import path_of
from hooklens.core.envelope import Schema, read_envelope, write_envelope
from hooklens.core.errors import FileRefused, InputError
from hooklens.core.files import check_writable, reading
from hooklens.core.fingerprint import identity
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.sweeps.settings import KERNELS, current, pinned

_SCHEMA = Schema("hooklens.sweep", 1, "a sweep in progress", "the same call")


@dataclass(frozen=True)
class Resume:
    """Where a sweep keeps its finished parts, and how it is recognised: `hl.patch(..., resume=hl.Resume(path))`.

    Without `key` the metric and the values to write are hashed with all that they refer to. A key takes the place of
    the metric's hash, for a metric that cannot be hashed or that changes as it is called: give another key for another
    metric. Weights, tokens and values to write are compared in any case, values that cannot be hashed by their name.

    The file is written whenever a batch of patches is finished. An interrupt loses the batch under way, so a sweep of a
    single batch starts from zero. A smaller `hl.engine(memory=)` makes smaller batches.
    """

    path: str | Path
    key: str | None = None
    call: str = field(default="hl.patch", kw_only=True, repr=False, compare=False)  # the method that writes it

    @property
    def schema(self) -> Schema:
        """The kind of the file, which errors about it name."""
        return replace(_SCHEMA, writer=f"{self.call}(..., resume=path)")

    @classmethod
    def of(cls, asked: "str | Path | Resume | None") -> "Resume | None":
        """The file that `resume=` asks for; a path alone asks for the hashes."""
        resume = cls(asked) if isinstance(asked, str | Path) else asked
        if resume is not None:
            path_of(getattr(resume, "path", resume), "resume")
        return resume

    def products(self) -> AbstractContextManager[Any]:
        """A `with` block in which linear layers multiply as they did when the file was begun."""
        check_writable(self.path)
        if not Path(self.path).exists():
            return pinned(None)
        with reading(self.path, self.schema.what):
            kernel = read_envelope(self.path, self.schema).content["kernel"]
        asked = current().kernel
        if kernel not in KERNELS:
            raise FileRefused(f"{self.path} names no kernel that its numbers came from; delete it")
        if asked not in (None, kernel):
            raise InputError(
                f"kernel={asked!r} was asked for, and {self.path} was begun with kernel={kernel!r}, which gives other "
                "last bits; leave the kernel out, or delete the file to start again"
            )
        return pinned(kernel)


class Progressed:
    """The values computed so far, and the file that keeps them."""

    def __init__(self, file: Resume, key: str, sketch: Float[Tensor, "number"], values: Tensor, kernel: str):
        self.path, self.schema = Path(file.path), file.schema
        self.key, self.sketch, self.values, self.kernel = key, sketch, values, kernel
        self.done = torch.zeros(values.shape, dtype=torch.bool)
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        file = read_envelope(self.path, self.schema)
        tensors = dict(file.tensors())
        with reading(self.path, self.schema.what):
            done, values, sketch = (tensors[name] for name in ("done", "values", "sketch"))
            key = file.content["key"]
        alike = sketch.shape == self.sketch.shape and torch.allclose(sketch, self.sketch, 1e-3, 1e-4, equal_nan=True)
        if key != self.key or not alike:
            raise FileRefused(
                f"{self.path} belongs to another sweep (other weights, prompts, sites, values, hooks or metric); "
                "delete it or give resume= another path. A metric that changes what it refers to as it is called (it "
                "counts, it keeps answers) is another one each time: give resume=hl.Resume(path, key='a name for it')"
            )
        if (done.shape, done.dtype, values.shape) != (self.done.shape, torch.bool, self.values.shape):
            raise FileRefused(f"{self.path} does not hold the values of this sweep; delete it")
        self.done = done
        self.values[done] = values[done].to(self.values)

    def finished(self, pairs: slice = slice(None)) -> set[int]:
        """The patches that are done for these pairs."""
        return set(self.done[:, pairs].all(1).nonzero().flatten().tolist())

    def save(self, finished: Iterable[int], pairs: slice = slice(None)) -> None:
        """Write all values computed so far, aside and renamed: a bin is complete."""
        self.done[list(finished), pairs] = True
        tensors = {"values": self.values, "done": self.done, "sketch": self.sketch}
        write_envelope(self.path, self.schema, {"key": self.key, "kernel": self.kernel}, tensors)


class Part:
    """What a file keeps of some pairs; nothing where there is no file."""

    def __init__(self, whole: Progressed | None = None, pairs: slice = slice(None)):
        self.whole, self.pairs, self.path = whole, pairs, None if whole is None else whole.path

    def finished(self) -> set[int]:
        """The patches that are done."""
        return set() if self.whole is None else self.whole.finished(self.pairs)

    def save(self, finished: Iterable[int]) -> None:
        """A bin is complete."""
        if self.whole is not None:
            self.whole.save(finished, self.pairs)


def key_of(model: HookedTransformer, asked: tuple[Any, Mapping[str, Any]], metric: Any, resume: Resume) -> str:
    """A hash of all that a sweep in progress must share to go on: weights, tokens, hooks, sites, values and metric."""
    grid, parts = asked
    if resume.key is not None:
        written = [_hash_or_name(part, name) for name, part in parts.items()]
        return identity((model.cfg.to_json(), dict(model.state_dict()), grid, written, "key", resume.key), "the sweep")
    named = {"the model": _model_parts(model), **parts, "the metric": metric}
    try:
        return identity((grid, *(identity(part, name) for name, part in named.items())), "the sweep")
    except InputError as error:
        raise InputError(
            f"resume= goes on only with the same sweep, and {error}; give resume=hl.Resume({str(resume.path)!r}, "
            "key='a name for this metric and value'), and another key when they change"
        ) from error


def _hash_or_name(part: Any, name: str) -> Any:
    """A hash of a value to write, or what it is called where it cannot be hashed."""
    if isinstance(part, tuple):
        return tuple(_hash_or_name(item, name) for item in part)
    try:
        return identity(part, name)
    except InputError:
        return getattr(part, "label", type(part).__qualname__)


def _model_parts(model: HookedTransformer) -> tuple[Any, ...]:
    """The model without its tokenizer, which a sweep over token ids does not ask, and the hooks active on it."""
    points = model.hook_points()
    hooks = {name: [hook.fn for hook in point.active() if not hook.backward] for name, point in points.items()}
    return model.cfg.to_json(), dict(model.named_children()), dict(model.named_parameters(recurse=False)), hooks


def sketch_of(base: Float[Tensor, "pair"], parts: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "number"]:
    """The base metric and two numbers of every tensor computed before the sweep. What a model computes is compared to
    rounding, not hashed: another number of threads gives other last bits."""
    numbers = [base.double().cpu()]
    for part in parts:
        flat = part.double().flatten().cpu()
        wave = torch.cos(torch.arange(len(flat), dtype=torch.float64))
        numbers.append(torch.stack([flat.abs().mean(), (flat * wave).sum() / max(1, len(flat)) ** 0.5]))
    return torch.cat(numbers)


@contextmanager
def products_of(file: Resume | None) -> Iterator[None]:
    """A `with` block of a sweep: no gradients, and products as the file was begun with, or the faster ones."""
    with torch.no_grad(), pinned(None) if file is None else file.products(), packed_linears(rows=1024):
        yield


@contextmanager
def resuming(asked: str | Path | Resume | None, call: str, n_lengths: int = 1) -> Iterator[Resume | None]:
    """The same with the file that a method was asked for, and a note on an interrupt where it was asked for none."""
    file = Resume.of(asked)
    if file is not None and n_lengths > 1:
        raise InputError("resume= needs prompts of one length; patch each length on its own")
    file = file and replace(file, call=call)
    try:
        with products_of(file):
            yield file
    except KeyboardInterrupt as interrupt:
        if asked is None:
            interrupt.add_note(f"{call}(..., resume=path) keeps what is finished in a file, and goes on from there")
        raise
