"""hooklens checkpoints: one safetensors file that says how to build the model, or a folder that adds its tokenizer.

The weights have their names in `model.state_dict()` (`blocks.0.attn.q.weight`); a tied weight is stored once. The
configuration is JSON in the file's metadata.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooklens.core.arguments import path_of
from hooklens.core.checksum import Digest, save_tensors
from hooklens.core.errors import FileRefused, HooklensError, InputError
from hooklens.core.files import make_folder, reading
from hooklens.model.config import HookedTransformerConfig
from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.build import assign, check_names, check_shapes, own_parameters, parameter_shapes
from hooklens.pretrained.safetensors_file import DTYPES, SafetensorsFile, is_safetensors, read_header

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer

FORMAT = "hooklens-model-2"
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
    path = path_of(path)
    tensors = _savable(model)
    metadata = {"format": FORMAT, "config": json.dumps(model.cfg.to_json(), allow_nan=False)}
    if path.suffix != ".safetensors":
        make_folder(path)
        if model.tokenizer is not None:
            model.tokenizer.save(path)
            metadata["tokenizer_sha256"] = json.dumps(_file_sums(path))
        path = path / FOLDER_FILE
    elif model.tokenizer is not None:
        metadata["tokenizer"] = _packed(model.tokenizer)
    save_tensors(path, tensors, metadata)


def load_checkpoint(
    path: str | Path,
    *,
    tokenizer: "Tokenizer | None" = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HookedTransformer:
    """Load a model that `save` wrote, in its saved dtype unless `dtype` is given."""
    path = path_of(path)
    with reading(path, "a checkpoint"):
        file = read_header(path / FOLDER_FILE if path.is_dir() else path)
        digest = Digest(file.metadata, {name: (entry.kind, entry.shape) for name, entry in file.entries.items()})
        model = _without_weights(file, digest, dtype)
        model.tokenizer = tokenizer or _tokenizer_of(path, file)
    for name in sorted(file.entries):
        assign(model, name, file.tensor(name, digest.update).to(device=device or "cpu", dtype=dtype))
    model.tie()
    if not digest.agrees(file.metadata):
        raise _damaged(file)
    return model


def is_checkpoint(path: Path) -> bool:
    """Whether the file exists and is a hooklens checkpoint."""
    return path.is_file() and is_safetensors(path) and read_header(path).metadata.get("format") == FORMAT


def _damaged(file: SafetensorsFile) -> FileRefused:
    return FileRefused(f"{file.path} is damaged: its content does not match its sha256; save or copy it again")


def _without_weights(file: SafetensorsFile, digest: Digest, dtype: torch.dtype | None) -> HookedTransformer:
    """The model of the file's configuration, on the meta device, with the names and shapes checked against the file."""
    cfg, where = _config(file, digest), str(file.path)
    if cfg.n_layers > len(file.entries):
        raise FileRefused(
            f"{where} has {len(file.entries)} weights, but its config has {cfg.n_layers:,} layers; save it again"
        )
    first = next((DTYPES[entry.kind] for entry in file.entries.values() if entry.kind in DTYPES), torch.float32)
    model = HookedTransformer(cfg, device="meta", dtype=dtype or first)
    wanted = parameter_shapes(model)
    check_names(file.entries, wanted, where, "its own configuration")
    shapes = {name: (entry.shape, wanted[name]) for name, entry in file.entries.items()}
    check_shapes({name: pair for name, pair in shapes.items() if pair[0] != pair[1]}, where)
    return model


def _savable(model: HookedTransformer) -> dict[str, Tensor]:
    """The parameters by name. Raises unless the configuration alone describes them."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in own_parameters(model, "a checkpoint").items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise InputError(
                f"{name} is {tensor.dtype}; a checkpoint can store {', '.join(DTYPES)}: convert the model first"
            )
    return tensors


def _config(file: SafetensorsFile, digest: Digest) -> HookedTransformerConfig:
    if file.metadata.get("format") != FORMAT:
        raise FileRefused(
            f"{file.path} is a safetensors file, but not a checkpoint that hooklens saved (expected format {FORMAT!r}, "
            f"got {file.metadata.get('format')!r}); to load a Hugging Face model, give its folder, with config.json"
        )
    if not digest.header_agrees(file.metadata):
        raise _damaged(file)
    try:
        return HookedTransformerConfig.from_json(json.loads(file.metadata["config"]))
    except HooklensError as error:
        raise FileRefused(
            f"{file.path} contains a configuration that cannot be read ({type(error).__name__}: {error}); if it "
            "uses a part that you defined, import the module that defines it first"
        ) from error


def _packed(tokenizer: "Tokenizer") -> str:
    """The tokenizer's own files as one JSON text."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return json.dumps({name: (Path(folder) / name).read_text(encoding="utf-8") for name in _TOKENIZER_FILES})


def _all_there(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _TOKENIZER_FILES)


def _file_sums(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _TOKENIZER_FILES}


def _tokenizer_of(path: Path, file: SafetensorsFile) -> "Tokenizer | None":
    from hooklens.pretrained.tokenizer import Tokenizer

    if path.is_dir():
        told = file.metadata.get("tokenizer_sha256")
        if told is not None and not (_all_there(path) and told == json.dumps(_file_sums(path))):
            raise FileRefused(
                f"{' or '.join(_TOKENIZER_FILES)} in {path} differs from the file that was saved with the model; copy "
                "the folder again, or give tokenizer="
            )
        return Tokenizer.from_folder(path) if (path / _TOKENIZER_FILES[0]).is_file() else None
    if "tokenizer" not in file.metadata:
        return None
    contents: dict[str, Any] = json.loads(file.metadata["tokenizer"])
    with tempfile.TemporaryDirectory() as folder:
        for name in _TOKENIZER_FILES:
            (Path(folder) / name).write_text(contents[name], encoding="utf-8")
        return Tokenizer.from_folder(folder)
