"""Read the fields of Tokenizer from a Hugging Face folder or a transformers object."""

from pathlib import Path
from typing import Any

from hooklens.core.errors import FileRefused, WrongType
from hooklens.core.files import read_json, read_text, reading


def read_folder(folder: Path) -> dict[str, Any]:
    """Read the fields of Tokenizer from tokenizer.json and the settings next to it."""
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise FileRefused(
            f"no tokenizer.json in {folder} (there: {there or 'nothing'}); transformers writes one with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    with reading(path, "a tokenizer"):
        backend = tokenizers.Tokenizer.from_str(read_text(path, "a tokenizer"))
        backend.no_truncation()
        backend.no_padding()
        _try(backend)
        return _fields(backend, folder)


def _try(backend: Any) -> None:
    """Use a tokenizer once: an inconsistent file causes a panic, but only then."""
    try:
        backend.decode(backend.encode("Two words, 1984.", add_special_tokens=False).ids)
    except Exception as error:
        if "Missing [UNK]" not in str(error):  # a vocabulary of characters or words that does not know this text
            raise


def _fields(backend: Any, folder: Path) -> dict[str, Any]:
    settings = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    numbers = _json(folder / "config.json") | _json(folder / "generation_config.json")
    # Files of an earlier Tokenizer.save, recognised by stop_token_ids, record BOS only in this setting.
    stated = settings.get("add_bos_token") if "stop_token_ids" in settings else None
    ids = {name: _id(backend, settings, numbers, name) for name in ("bos", "eos", "pad", "unk")}
    return {
        "backend": backend,
        **{f"{name}_id": i for name, i in ids.items()},
        "default_prepend_bos": _trained_with_bos(backend, ids["bos"]) if stated is None else stated,
        "chat_template": _template(folder, settings),
        "stop_ids": _stops(settings.get("stop_token_ids") or numbers.get("eos_token_id"), ids["eos"]),
    }


def read_transformers(tokenizer: Any) -> dict[str, Any]:
    """Read the fields of Tokenizer from a transformers tokenizer that is built on the tokenizers library."""
    import tokenizers

    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), tokenizers.Tokenizer):
        raise WrongType(
            f"a {type(tokenizer).__name__} has no backend_tokenizer of the tokenizers library; load a tokenizer that "
            "has one with AutoTokenizer.from_pretrained(...)"
        )
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    template = tokenizer.chat_template
    return {
        "backend": backend,
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "unk_id": tokenizer.unk_token_id,
        "default_prepend_bos": _trained_with_bos(backend, tokenizer.bos_token_id),
        "chat_template": template.get("default") if isinstance(template, dict) else template,
        "stop_ids": _stops(None, tokenizer.eos_token_id),
    }


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, "a tokenizer's settings") if path.is_file() else {}


def _id(backend: Any, settings: dict[str, Any], numbers: dict[str, Any], name: str) -> int | None:
    """A special token's id: by its text in the tokenizer's settings, else by its number in the model's."""
    entry = settings.get(f"{name}_token")
    text = entry.get("content") if isinstance(entry, dict) else entry
    if text is not None:
        return backend.token_to_id(text)
    return next(iter(_ids(numbers.get(f"{name}_token_id"))), None)


def _ids(given: Any) -> list[int]:
    """Token ids in a settings file: a number, a list or null; some files use -1 for none."""
    ids = given if isinstance(given, list) else [given]
    ids = [] if given is None else ids
    if not all(type(i) is int and -1 <= i < 2**32 for i in ids):
        raise TypeError(f"a token id is a whole number of at least 0, got {given!r:.80}")
    return [i for i in ids if i >= 0]


def _stops(given: Any, eos: int | None) -> tuple[int, ...]:
    return tuple(dict.fromkeys(i for i in (*_ids(given), eos) if i is not None))


def _trained_with_bos(backend: Any, bos: int | None) -> bool:
    """Whether BOS belongs in front, according to the tokenizer's own post-processor.

    `add_bos_token` in the settings is ignored: transformers 5 uses tokenizer.json as it is, whatever the setting says.
    """
    return bos is not None and backend.encode("", add_special_tokens=True).ids[:1] == [bos]


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template: from its own file, or from the settings, which may name several."""
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return read_text(alone, "a chat template")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise TypeError(f"its chat template is a {type(template).__name__}, not a string")
    return template
