"""Our own checkpoints: one safetensors file that says how to build the model, or a folder with its tokenizer beside it.

The weights stand under their names in `model.state_dict()` (`blocks.0.attn.q.weight`), a tied one once; the
configuration is JSON in the file's metadata.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooklens.core.errors import FileRefused, HooklensError, InputError
from hooklens.core.files import make_folder, reading, write_atomically
from hooklens.model.config import HookedTransformerConfig
from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.build import assign, check_names, check_shapes, own_parameters, parameter_shapes
from hooklens.pretrained.safetensors_file import DTYPES, SafetensorsFile, is_safetensors, read_header

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer

FORMAT = "hooklens-model-1"
FOLDER_FILE = "model.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def save_checkpoint(model: HookedTransformer, path: str | Path) -> None:
    """Write a model, its configuration and its tokenizer; `load(path)` brings them back.

    A path that ends in .safetensors becomes one file, any other a folder of that file and the tokenizer's. The file is
    written aside and renamed: it is whole or not there. Hooks are not saved.

    >>> from hooklens.testing import tiny_model
    >>> path = Path(tempfile.mkdtemp()) / "tiny.safetensors"
    >>> save_checkpoint(tiny_model(), path)
    >>> load_checkpoint(path).cfg == tiny_model().cfg
    True
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors = _savable(model)
    metadata = {
        "format": FORMAT,
        "config": json.dumps(model.cfg.to_json(), allow_nan=False),
        "sha256": _digest(tensors),
    }
    if path.suffix != ".safetensors":
        make_folder(path)
        if model.tokenizer is not None:
            model.tokenizer.save(path)
        path = path / FOLDER_FILE
    elif model.tokenizer is not None:
        metadata["tokenizer"] = _packed(model.tokenizer)
    with write_atomically(path) as aside:
        save_file(tensors, aside, metadata)


def load_checkpoint(
    path: str | Path,
    *,
    tokenizer: "Tokenizer | None" = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HookedTransformer:
    """The model that `save_checkpoint` wrote, in the dtype that it had unless another is asked for."""
    path = Path(path)
    with reading(path, "a checkpoint"):
        file = read_header(path / FOLDER_FILE if path.is_dir() else path)
        model = _without_weights(file, dtype)
        model.tokenizer = tokenizer or _tokenizer_of(path, file)
    _assign_all(model, file, device, dtype)
    return model


def is_checkpoint(path: Path) -> bool:
    """Is there a file, and is it a checkpoint of ours?"""
    return path.is_file() and is_safetensors(path) and read_header(path).metadata.get("format") == FORMAT


def _without_weights(file: SafetensorsFile, dtype: torch.dtype | None) -> HookedTransformer:
    """The model that the file's configuration describes, on the meta device; names and shapes are those in the file."""
    cfg, where = _config(file), str(file.path)
    if cfg.n_layers > len(file.entries):
        raise FileRefused(
            f"{where} holds {len(file.entries)} weights, its configuration says {cfg.n_layers:,} layers; save it again"
        )
    first = next((DTYPES[entry.kind] for entry in file.entries.values() if entry.kind in DTYPES), torch.float32)
    model = HookedTransformer(cfg, device="meta", dtype=dtype or first)
    wanted = parameter_shapes(model)
    check_names(file.entries, wanted, where, "its own configuration")
    shapes = {name: (entry.shape, wanted[name]) for name, entry in file.entries.items()}
    check_shapes({name: pair for name, pair in shapes.items() if pair[0] != pair[1]}, where)
    return model


def _assign_all(
    model: HookedTransformer, file: SafetensorsFile, device: str | torch.device | None, dtype: torch.dtype | None
) -> None:
    digest = hashlib.sha256()
    for name in sorted(file.entries):
        entry = file.entries[name]
        digest.update(_described(name, DTYPES.get(entry.kind), entry.shape))
        assign(model, name, file.tensor(name, digest.update).to(device=device or "cpu", dtype=dtype))
    model.tie()
    if digest.hexdigest() != file.metadata.get("sha256"):
        raise FileRefused(f"{file.path} is damaged: its weights do not match its own sha256; save or copy it again")


def _savable(model: HookedTransformer) -> dict[str, Tensor]:
    """The parameters by name, after it was checked that the configuration alone describes them."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in own_parameters(model, "a checkpoint").items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise InputError(
                f"{name} is {tensor.dtype}; a checkpoint holds {', '.join(DTYPES)}: convert the model first"
            )
    # A parameter that is a window onto more memory is copied: the format stores each tensor's bytes, and only these.
    return {n: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t for n, t in tensors.items()}


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(_described(name, tensors[name].dtype, tuple(tensors[name].shape)))
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _described(name: str, dtype: torch.dtype | None, shape: tuple[int, ...]) -> bytes:
    return json.dumps([name, str(dtype), shape]).encode()


def _config(file: SafetensorsFile) -> HookedTransformerConfig:
    if file.metadata.get("format") != FORMAT:
        raise FileRefused(
            f"{file.path} is a safetensors file, but no checkpoint that hooklens saved (format {FORMAT!r}, this has "
            f"{file.metadata.get('format')!r}); a Hugging Face model is loaded by its folder, config.json included"
        )
    try:
        return HookedTransformerConfig.from_json(json.loads(file.metadata["config"]))
    except HooklensError as error:
        raise FileRefused(
            f"{file.path} holds a configuration that cannot be read ({type(error).__name__}: {error}); if it "
            "has a part of your own, import the module that defines it first"
        ) from error


def _packed(tokenizer: "Tokenizer") -> str:
    """The tokenizer's own files as one JSON text."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return json.dumps({name: (Path(folder) / name).read_text(encoding="utf-8") for name in _TOKENIZER_FILES})


def _tokenizer_of(path: Path, file: SafetensorsFile) -> "Tokenizer | None":
    from hooklens.pretrained.tokenizer import Tokenizer

    if path.is_dir():
        return Tokenizer.from_folder(path) if (path / _TOKENIZER_FILES[0]).is_file() else None
    if "tokenizer" not in file.metadata:
        return None
    contents: dict[str, Any] = json.loads(file.metadata["tokenizer"])
    with tempfile.TemporaryDirectory() as folder:
        for name in _TOKENIZER_FILES:
            (Path(folder) / name).write_text(contents[name], encoding="utf-8")
        return Tokenizer.from_folder(folder)
