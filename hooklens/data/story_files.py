"""TinyStories: stories that a language model wrote for small models, from the hub or from a file of the same schema."""

import json
import os
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooklens.core.arguments import path_of, whole
from hooklens.core.errors import FileRefused, InputError, Unavailable
from hooklens.core.files import reading
from hooklens.data.text_windows import TextSplit, TextWindows, kept_aside, read_chunks

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer

BETWEEN = "\n\n\n"
_HUB = "roneneldan/TinyStories"
_ROWS = 256  # rows of a parquet file that are in memory at a time


def tiny_stories_dataset(
    path: str | os.PathLike | None = None,
    *,
    n: int | None = None,
    tokenizer: "str | Tokenizer" = "byte_pairs",
    window: int = 128,
    held_out: float = 0.1,
    d_vocab: int = 1024,
    seed: int = 0,
) -> TextWindows:
    """The first `n` stories (None: all) of TinyStories, two blank lines between them; the last part is held out.

    `path` is a .jsonl or .parquet file with a column "text"; None streams the training stories from the hub. Both the
    hub and parquet need the extra: pip install 'hooklens[datasets]'. The other arguments as in `hl.data.text`.

    >>> path = Path(tempfile.mkdtemp()) / "stories.jsonl"
    >>> lines = [json.dumps({"text": f"Once there was a cat. It saw {i} dogs."}) for i in range(40)]
    >>> _ = path.write_text("\\n".join(lines))
    >>> data = tiny_stories_dataset(path, tokenizer="characters", window=16)
    >>> data.tokenizer.to_string(data.tokens[:21].tolist())
    'Once there was a cat.'

    Reference: Eldan and Li (2023), "TinyStories: how small can language models be and still speak coherent English?".
    """
    if n is not None:
        whole("n", n, 1)
    name, stories = ("TinyStories", _from_hub()) if path is None else _from_file(path_of(path))
    with kept_aside("the stories"), tempfile.TemporaryDirectory(prefix="hooklens-stories-") as folder:
        copy = Path(folder) / "stories.txt"
        with open(copy, "w", encoding="utf-8") as file:
            file.writelines(story.strip() + BETWEEN for story in islice(stories, n))
        split = TextSplit(name, lambda: read_chunks(copy), held_out)
        return split.windows(tokenizer, d_vocab, window=window, seed=seed)


def _from_file(path: Path) -> tuple[str, Iterator[str]]:
    readers = {".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in readers:
        raise InputError(
            f"stories are read from a .jsonl or .parquet file with a column 'text', got {path.name!r}; hl.data.text "
            "reads plain text"
        )
    return path.name, readers[path.suffix](path)


def _jsonl(path: Path) -> Iterator[str]:
    with reading(path, "stories"), open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = json.loads(line)
                yield _text_of(row.get("text") if isinstance(row, dict) else None, path, f"line {number}", row)


def _parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise Unavailable("a parquet file needs pyarrow: pip install 'hooklens[datasets]'") from error
    row = 0
    with reading(path, "stories"), parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        if "text" not in columns:
            raise _without_text(path, f"its columns are {', '.join(columns)}")
        for batch in file.iter_batches(_ROWS, columns=["text"]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield _text_of(value, path, f"row {row}", value)


def _from_hub() -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise Unavailable(
            "TinyStories comes from the hub through the datasets package: pip install 'hooklens[datasets]'; or give "
            "the path of a .jsonl file with a column 'text'"
        ) from error
    try:
        for row in load_dataset(_HUB, split="train", streaming=True):
            yield row["text"]
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Unavailable(
            f"{_HUB} could not be read from the hub ({reason:.200}); "
            "check the network, or download its parquet files by other means and give the path of one"
        ) from error


def _text_of(value: Any, path: Path, where: str, row: Any) -> str:
    if not isinstance(value, str):
        seen = f"its columns are {', '.join(map(str, row))}" if isinstance(row, dict) else f"it holds {row!r:.60}"
        raise _without_text(path, f"{where}: {seen}")
    return value


def _without_text(path: Path, seen: str) -> FileRefused:
    return FileRefused(f"cannot read stories from {str(path)!r}: every row needs a column 'text'; {seen}")
