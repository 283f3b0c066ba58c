"""Load Hugging Face models: a local folder, a hub id, a transformers model in memory, a GGUF file."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hooklens.core.errors import FileRefused, InputError, Unavailable
from hooklens.core.files import read_json, reading
from hooklens.core.safetensors_file import SafetensorsFile, read_header
from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.builder import Weights, build
from hooklens.pretrained.gguf import GGUFFile, read_gguf
from hooklens.pretrained.gguf_to_hf import hf_config, hf_names, hf_tensors
from hooklens.pretrained.tokenizer import Tokenizer

Device = str | torch.device | None
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
#: Files fetched from the hub: safetensors weights and settings. Nothing that could contain code.
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
)


def weights_in_folder(folder: Path) -> Weights:
    """The tensors of a folder's safetensors files."""
    files = {name: file for file in _shards(folder) for name in file.entries}
    shapes = {name: file.entries[name].shape for name, file in files.items()}
    return Weights(str(folder), shapes, lambda names: ((name, files[name].tensor(name)) for name in names))


def weights_in_memory(module: nn.Module) -> Weights:
    """The tensors of a module in memory, copied."""
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    where = f"the {type(module).__name__} in memory"
    return Weights(where, shapes, lambda names: ((name, tensors[name].clone()) for name in names))


def weights_in_gguf(file: GGUFFile) -> Weights:
    """The tensors of a GGUF file, dequantised; their hub shapes are known only after reading."""

    def read(names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in hf_tensors(file) if name in names)

    return Weights(str(file.path), dict.fromkeys(hf_names(file).values()), read)


def load_folder(
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
) -> HookedTransformer:
    """Load a Hugging Face folder: config.json, safetensors (one file or shards), and tokenizer.json if present."""
    with reading(folder, "a model"):
        values = _configuration(folder)
        weights = weights_in_folder(folder)
        if tokenizer is None and (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_folder(folder)
        settings = folder / "generation_config.json"
        generation = read_json(settings, "generation settings") if settings.is_file() else {}
        tokenizer = with_stops(tokenizer, (values | generation).get("eos_token_id"))
    return build(values, weights, name=name or folder.name, tokenizer=tokenizer, device=device, dtype=dtype)


def load_gguf(
    path: Path,
    *,
    tokenizer: Tokenizer | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
) -> HookedTransformer:
    """Load a GGUF file, with the tokenizer of its metadata."""
    file = read_gguf(path)
    with reading(path, "a model"):
        weights = weights_in_gguf(file)
    if tokenizer is None and "tokenizer.ggml.model" in file.metadata:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    tokenizer = with_stops(tokenizer, ends)
    return build(hf_config(file), weights, name=name or path.stem, tokenizer=tokenizer, device=device, dtype=dtype)


def load_module(
    module: Any, *, tokenizer: Tokenizer | None = None, device: Device = None, dtype: torch.dtype | None = None
) -> HookedTransformer:
    """Copy a transformers model in memory, on its device and in its dtype unless others are given."""
    first = next(module.parameters())
    values = module.config.to_dict()
    generation = getattr(module, "generation_config", None) or module.config
    name = str(values.get("_name_or_path") or getattr(module.config, "_name_or_path", "") or type(module).__name__)
    return build(
        values | {"architectures": [type(module).__name__]},
        weights_in_memory(module),
        name=name,
        tokenizer=with_stops(tokenizer, getattr(generation, "eos_token_id", None)),
        device=first.device if device is None else device,
        dtype=dtype or first.dtype,
    )


def with_stops(tokenizer: Tokenizer | None, ends: Any) -> Tokenizer | None:
    """The tokenizer, with the stop tokens (one or several) of the model's own settings added."""
    if tokenizer is None:
        return None
    ids = [i for i in (ends if isinstance(ends, list | tuple) else [ends]) if i is not None]
    if not all(type(i) is int and -1 <= i < 2**32 for i in ids):  # some files use -1 for none
        raise InputError(f"eos_token_id is a token id, a list of ids or null, got {ends!r:.80}; correct the settings")
    stops = tuple(dict.fromkeys((*tokenizer.stop_ids, *(i for i in ids if i >= 0))))
    return tokenizer if stops == tokenizer.stop_ids else replace(tokenizer, stop_ids=stops)


def fetch_from_hub(repo: str) -> Path:
    """Download a hub model's configuration, safetensors and tokenizer, and nothing else; return their folder."""
    try:
        import huggingface_hub
    except ImportError:
        raise Unavailable(
            f"loading {repo!r} from the hub needs the package huggingface_hub, which is not installed; "
            "run `pip install 'hooklens[hub]'`, or give the path of a folder or a GGUF file"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # depending on its version: its own, requests', httpx's or system errors
        raise _hub_failed(repo, error) from error


def _hub_failed(repo: str, error: Exception) -> Exception:
    kind, first = type(error).__name__, (str(error).strip() or "no message").splitlines()[0]
    if kind in ("RepositoryNotFoundError", "HFValidationError"):
        return InputError(
            f"the hub has no model {repo!r} ({kind}: {first}); check its spelling, or log in if it is private"
        )
    if kind == "GatedRepoError":
        return Unavailable(f"{repo!r} is gated: accept its terms on its hub page and run `hf auth login`")
    return Unavailable(
        f"{repo!r} could not be fetched from the hub ({first}); check the network, or give the path of a "
        "folder or a GGUF file on this machine"
    )


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if of_run := sorted(folder.glob("checkpoints/step_*.safetensors")):
            raise FileRefused(f"{folder} is the folder of a run; give one of its checkpoints, such as {of_run[-1]}")
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise FileRefused(f"{folder} has no {path.name} (it contains {there}); is it a Hugging Face model's folder?")
    return read_json(path, "a model's configuration")


def _shards(folder: Path) -> list[SafetensorsFile]:
    """The folder's safetensors files: those of its index, or the only file."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [read_header(_only_file(folder))]
    where = read_json(index, "an index of weights").get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in where.values()
    ):
        raise FileRefused(f"{index} has no weight_map from names to files in its folder; download it again")
    names = sorted(set(where.values()))
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise FileRefused(f"{folder} lacks {len(absent)} of its {len(names)} weight files: {', '.join(absent[:4])}")
    files = [read_header(folder / name) for name in names]
    held = {name: file.path.name for file in files for name in file.entries}
    if moved := sorted(name for name in held.keys() | where.keys() if held.get(name) != where.get(name)):
        raise FileRefused(
            f"{index.name} and the files disagree on where {len(moved)} weights are: {', '.join(moved[:4])}; "
            "download the folder again"
        )
    return files


def _only_file(folder: Path) -> Path:
    if (folder / "model.safetensors").is_file():
        return folder / "model.safetensors"
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise FileRefused(
            f"{folder} has {len(files)} safetensors files ({', '.join(f.name for f in files[:4])}) but no "
            "model.safetensors.index.json to say which belong to the model; add the index"
        )
    pickled = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _PICKLED)
    if pickled:
        raise FileRefused(
            f"{folder} contains pickled weights ({', '.join(pickled[:4])}): opening a pickle runs the code in it, "
            "so hooklens never does it; save the model again as safetensors, with transformers' save_pretrained"
        )
    raise FileRefused(f"{folder} has no safetensors file; the weights are expected in the same folder as config.json")
