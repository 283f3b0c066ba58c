"""hooklens checkpoints: one safetensors file that says how to build the model, or a folder that adds its tokenizer.

The weights have their names in `model.state_dict()` (`blocks.0.attn.q.weight`); a tied weight is stored once. The
configuration is JSON in the file's metadata.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooklens.core.arguments import path_of
from hooklens.core.envelope import Envelope, Schema, file_digest, read_envelope, schema_name, write_envelope
from hooklens.core.errors import FileRefused, HooklensError, InputError
from hooklens.core.files import make_folder, reading
from hooklens.core.safetensors_file import DTYPES, FLOATS, is_safetensors
from hooklens.model.config import HookedTransformerConfig
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.pretrained.builder import assign, check_names, check_shapes, own_parameters, parameter_shapes
from hooklens.pretrained.tokenizer import Tokenizer

_WRITER = "hl.save, or load a Hugging Face model by its folder, config.json included"
SCHEMA = Schema("hooklens.model", 1, "a checkpoint", _WRITER)
FOLDER_FILE = "model.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def save(model: HookedTransformer, path: str | Path) -> None:
    """Save a model, its configuration and its tokenizer; `load(path)` reads them back.

    A path that ends in .safetensors becomes one file; any other path becomes a folder with that file and the
    tokenizer's files. The file is written to a temporary name and then renamed, so it is never partial. Hooks are not
    saved.

    >>> from hooklens.testing import tiny_model
    >>> path = Path(tempfile.mkdtemp()) / "tiny.safetensors"
    >>> save(tiny_model(), path)
    >>> load_checkpoint(path).cfg == tiny_model().cfg
    True
    """
    need_hooked(model, "save")
    path = path_of(path)
    tensors = _savable(model)
    content: dict[str, Any] = {"config": model.cfg.to_json()}
    if path.suffix != ".safetensors":
        make_folder(path)
        if model.tokenizer is not None:
            model.tokenizer.save(path)
            content["tokenizer_sha256"] = _file_sums(path)
        path = path / FOLDER_FILE
    elif model.tokenizer is not None:
        content["tokenizer"] = model.tokenizer.files()
    write_envelope(path, SCHEMA, content, tensors)


def load_checkpoint(
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HookedTransformer:
    """Load a model that `save` wrote, in its saved dtype unless `dtype` is given, and in evaluation mode."""
    path = path_of(path)
    file = read_envelope(path / FOLDER_FILE if path.is_dir() else path, SCHEMA)
    with reading(path, SCHEMA.what):
        model = _without_weights(file, dtype)
        model.tokenizer = tokenizer or _tokenizer_of(path, file.content)
    for name, weight in file.tensors():
        assign(model, name, weight.to(device=device or "cpu", dtype=dtype))
    model.tie()
    return model.eval()  # a new module is in training mode, in which dropout acts


def is_checkpoint(path: Path) -> bool:
    """Is there a file, and is it a checkpoint of ours?"""
    return path.is_file() and is_safetensors(path) and schema_name(path) == SCHEMA.name


def _without_weights(file: Envelope, dtype: torch.dtype | None) -> HookedTransformer:
    """The model that the file's configuration describes, on the meta device; names and shapes are those in the file."""
    cfg, where, entries = _config(file), str(file.path), file.entries
    if cfg.n_layers > len(entries):
        raise FileRefused(
            f"{where} holds {len(entries)} weights, its configuration says {cfg.n_layers:,} layers; save it again"
        )
    if odd := sorted({entry.kind for entry in entries.values()} - set(FLOATS)):
        raise FileRefused(f"{where} holds weights stored as {odd[0]}; a checkpoint holds {', '.join(FLOATS)}")
    first = next((DTYPES[entry.kind] for entry in entries.values()), torch.float32)
    model = HookedTransformer(cfg, device="meta", dtype=dtype or first)
    wanted = parameter_shapes(model)
    check_names(entries, wanted, where, "its own configuration")
    check_shapes({name: (entry.shape, wanted[name]) for name, entry in entries.items()}, where)
    return model


def _savable(model: HookedTransformer) -> dict[str, Tensor]:
    """The parameters by name. Raises unless the configuration alone describes them."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in own_parameters(model, "a checkpoint").items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in [DTYPES[kind] for kind in FLOATS]:
            raise InputError(
                f"{name} is {tensor.dtype}; a checkpoint holds {', '.join(FLOATS)}: convert the model first"
            )
    return tensors


def _config(file: Envelope) -> HookedTransformerConfig:
    try:
        return HookedTransformerConfig.from_json(file.content["config"])
    except HooklensError as error:
        raise FileRefused(
            f"{file.path} contains a configuration that cannot be read ({type(error).__name__}: {error}); if it "
            "uses a part that you defined, import the module that defines it first"
        ) from error


def _file_sums(folder: Path) -> dict[str, str | None]:
    paths = {name: folder / name for name in _TOKENIZER_FILES}
    return {name: file_digest(path) if path.is_file() else None for name, path in paths.items()}


def _tokenizer_of(path: Path, content: dict[str, Any]) -> Tokenizer | None:
    if path.is_dir():
        sums = content.get("tokenizer_sha256")
        if sums is not None and sums != _file_sums(path):
            raise FileRefused(
                f"{' or '.join(_TOKENIZER_FILES)} in {path} differs from the file that was saved with the model; copy "
                "the folder again, or give tokenizer="
            )
        return Tokenizer.from_folder(path) if (path / _TOKENIZER_FILES[0]).is_file() else None
    if "tokenizer" not in content:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name in _TOKENIZER_FILES:
            (Path(folder) / name).write_text(content["tokenizer"][name], encoding="utf-8")
        return Tokenizer.from_folder(folder)
