"""A headless Chromium without a network: what a page becomes in it, what it complains about, what it asks for."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions"]
_FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps"]
_FLAGS += ["--hide-scrollbars", "--enable-logging=stderr", "--log-level=0"]
# every name fails to resolve and every connection goes to a closed port: nothing is reached even if it is asked for
_OFFLINE = ["--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"]
_CONSOLE = re.compile(r":(?:INFO|WARNING|ERROR):CONSOLE[^\]]*\] (.*)")


@dataclass(frozen=True)
class Page:
    dom: str
    """The document after its scripts ran."""
    console: list[str]
    """Every line that the page or the browser wrote to the console, such as an error or a blocked script."""
    requests: list[str]
    """Every address that the page asked for, itself aside; data: addresses are no requests."""

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.dom))

    @property
    def figures(self) -> int:
        """How many Plotly figures were drawn."""
        return self.count(r'<g class="cartesianlayer">')


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


def open_page(path: str | os.PathLike, *, width: int = 1280, height: int = 900, query: str = "") -> Page:
    """Open a local file with the network off, let its scripts finish, and say what happened; skips without Chromium."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "net.json"
        asked = [f"--window-size={width},{height}", f"--log-net-log={log}", "--virtual-time-budget=10000", "--dump-dom"]
        address = Path(path).resolve().as_uri() + query
        done = _run(scratch, [*asked, address])
        requests = _requests(log, address)
    return Page(done.stdout, _CONSOLE.findall(done.stderr), requests)


def screenshot(
    path: str | os.PathLike, png: str | os.PathLike, width: int = 1280, height: int = 900, *, dark: bool = False
) -> Path:
    """A picture of the page as it looks in a window of that size; skips without Chromium."""
    with tempfile.TemporaryDirectory() as scratch:
        asked = [
            f"--window-size={width},{height}",
            f"--screenshot={Path(png).resolve()}",
            "--virtual-time-budget=10000",
        ]
        asked += ["--blink-settings=preferredColorScheme=0"] if dark else []
        _run(scratch, [*asked, Path(path).resolve().as_uri()])
    return Path(png)


def _run(scratch: str, arguments: list[str]) -> subprocess.CompletedProcess:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium was found on the PATH (chromium, chromium-browser, google-chrome)")
    command = [chromium, *_FLAGS, *_OFFLINE, f"--user-data-dir={scratch}/profile", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(f"Chromium ended with {done.returncode}: {done.stderr[-2000:]}")
    return done


def _requests(log: Path, page: str) -> list[str]:
    """What the page asked for, by Chromium's record of its network stack: one event a line.

    The browser's own requests (its clock, its updates) carry the initiator "not an origin"; the page's carry "null".
    """
    found = set()
    for line in log.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # not an event
            asked = json.loads(line.strip().rstrip(",")).get("params", {})
            if asked.get("initiator", "not an origin") != "not an origin":
                found.add(asked.get("url", ""))
    return sorted(url for url in found if url not in ("", page) and not url.startswith(("data:", "chrome")))
