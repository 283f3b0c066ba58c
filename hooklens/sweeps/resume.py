"""Finished bins of a sweep, on disk: an interrupted sweep goes on where it stopped, and only if it is the same sweep."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooklens.core.errors import FileRefused
from hooklens.core.files import write_atomically
from hooklens.sweeps.plan import Plan

_FORMAT = "hooklens-sweep-1"


class Progressed:
    """The values found so far, and the file that keeps them."""

    def __init__(self, path: str | Path, key: str, values: Tensor):
        self.path, self.key, self.values = Path(path), key, values
        self.done = torch.zeros(len(values), dtype=torch.bool)
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise FileRefused(f"{self.path} is not a sweep in progress; give resume= a path of its own")
                if metadata.get("key") != self.key:
                    raise FileRefused(
                        f"{self.path} belongs to another sweep (other weights, prompts, sites, values or metric); "
                        "delete it or give resume= another path"
                    )
                self.done = file.get_tensor("done")
                self.values.copy_(file.get_tensor("values"))
        except (SafetensorError, OSError) as error:
            raise FileRefused(f"{self.path} cannot be read as a sweep in progress, it is damaged: {error}") from error

    def save(self, finished: list[int]) -> None:
        """A bin is complete: write everything found so far, aside and renamed."""
        from safetensors.torch import save_file

        self.done[finished] = True
        with write_atomically(self.path) as aside:
            metadata = {"format": _FORMAT, "key": self.key}
            save_file({"values": self.values.cpu().contiguous(), "done": self.done}, aside, metadata=metadata)


def key_of(plan: Plan, metric: Any, base: Tensor) -> str:
    """A hash of weights, tokens, sites, values and metric: what a sweep in progress must share to go on."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in plan.model.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(p))
    digest.update(_bytes(plan.tokens))
    digest.update(repr((plan.site, plan.by, plan.shape, plan.patches)).encode())
    for layer, value in sorted(plan.values.items()):
        digest.update(str(layer).encode() + _bytes(value))
    digest.update(_metric_fingerprint(metric) + _bytes(base))
    return digest.hexdigest()


def _metric_fingerprint(metric: Any) -> bytes:
    """A dataclass metric by its fields, a function by its code; both also by their values on the base run."""
    code = getattr(metric, "__code__", None)
    parts = [type(metric).__name__.encode(), getattr(metric, "__qualname__", "").encode()]
    if code is not None:
        parts += [code.co_code, repr(code.co_consts).encode() if not _nested(code) else b""]
    for name, value in sorted(vars(metric).items()) if hasattr(metric, "__dict__") else []:
        parts += [name.encode(), _bytes(value) if isinstance(value, Tensor) else repr(value).encode()]
    return b"\0".join(parts)


def _nested(code: Any) -> bool:
    return any(hasattr(const, "co_code") for const in code.co_consts)  # their repr holds an address


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
