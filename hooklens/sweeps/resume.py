"""Finished bins of a sweep, on disk: an interrupted sweep goes on where it stopped, if it is the same sweep."""

import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.core.errors import FileRefused
from hooklens.core.files import check_writable, reading, write_atomically
from hooklens.sweeps.plan import Plan

_FORMAT = "hooklens-sweep-1"


class Progressed:
    """The values found so far, and the file that keeps them."""

    def __init__(self, path: str | Path, key: str, sketch: Float[Tensor, "number"], values: Tensor):
        self.path, self.key, self.sketch, self.values = Path(path), key, sketch, values
        self.done = torch.zeros(len(values), dtype=torch.bool)
        check_writable(self.path)
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        from safetensors import safe_open

        with reading(self.path, "a sweep in progress"), safe_open(str(self.path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise FileRefused(f"{self.path} is not a sweep in progress; give resume= a path of its own")
            if metadata.get("key") != self.key:
                raise self._another()
            done, values, sketch = (file.get_tensor(name) for name in ("done", "values", "sketch"))
            if metadata.get("sum") != _sum(values, done, sketch):
                raise FileRefused(f"{self.path} is damaged: its numbers are not those that were written; delete it")
            if (done.shape, done.dtype, values.shape) != (self.done.shape, torch.bool, self.values.shape):
                raise FileRefused(f"{self.path} is damaged: its numbers have other shapes; delete it")
            if not self._alike(sketch):
                raise self._another()
            self.done = done
            self.values.copy_(values)

    def _another(self) -> FileRefused:
        return FileRefused(
            f"{self.path} belongs to another sweep (other weights, prompts, sites, values or metric); "
            "delete it or give resume= another path"
        )

    def _alike(self, sketch: Tensor) -> bool:
        return sketch.shape == self.sketch.shape and torch.allclose(sketch, self.sketch, 1e-3, 1e-4, equal_nan=True)

    def save(self, finished: list[int]) -> None:
        """A bin is complete: write everything found so far, aside and renamed."""
        from safetensors.torch import save_file

        self.done[finished] = True
        values = self.values.cpu().contiguous()
        with write_atomically(self.path) as aside:
            metadata = {"format": _FORMAT, "key": self.key, "sum": _sum(values, self.done, self.sketch)}
            save_file({"values": values, "done": self.done, "sketch": self.sketch}, aside, metadata=metadata)


def _sum(*tensors: Tensor) -> str:
    return hashlib.blake2b(b"".join(map(_bytes, tensors)), digest_size=16).hexdigest()


def key_of(plan: Plan, metric: Any) -> str:
    """A hash of weights, tokens, sites, what is written and metric: what a sweep in progress must share to go on."""
    digest = hashlib.blake2b(digest_size=16)
    written = None if isinstance(plan.source, Mapping) else plan.source
    for part in fingerprint((plan.model.cfg.to_json(), plan.model.state_dict(), plan.tokens, written)):
        digest.update(part)
    for part in fingerprint((plan.site, plan.by, plan.shape, plan.patches, metric)):
        digest.update(part)
    return digest.hexdigest()


def sketch_of(plan: Plan, base: Float[Tensor, "pair"]) -> Float[Tensor, "number"]:
    """The base metric and two numbers of every layer's values. What a model computes is compared to rounding, not
    hashed: another number of threads, or packed weights, give other last bits."""
    found = [base.double().cpu()]
    for _, value in sorted(plan.values.items()):
        flat = value.double().flatten().cpu()
        wave = torch.cos(torch.arange(len(flat), dtype=torch.float64))
        found.append(torch.stack([flat.abs().mean(), (flat * wave).sum() / max(1, len(flat)) ** 0.5]))
    return torch.cat(found)


def fingerprint(value: Any, depth: int = 8) -> Iterator[bytes]:
    """What tells two values apart, the same in every process: tensors by content, functions by code and closure.

    >>> list(fingerprint((1, "a")))
    [b'tuple', b'1', b"'a'"]
    """
    if isinstance(value, Tensor):
        yield f"{value.dtype} {list(value.shape)}".encode()
        yield _bytes(value)
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield repr(value).encode()
    else:
        yield type(value).__qualname__.encode()
        for part in _parts(value) if depth else ():
            yield from fingerprint(part, depth - 1)


def _parts(value: Any) -> Any:
    if isinstance(value, CodeType):
        return (value.co_code, value.co_names, value.co_consts)
    if isinstance(value, FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        return (value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, *cells)
    if isinstance(value, MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, nn.Module):
        return (value.state_dict(),)
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return value
    if hasattr(value, "__qualname__"):  # a class, a built-in function
        return (value.__qualname__,)
    return _parts(vars(value)) if hasattr(value, "__dict__") else ()


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty yet
        return None


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
