"""Settings of the whole suite. pytest also puts this folder on sys.path, so that every test can import `families`."""

import os
import signal

import annotations
from hypothesis import settings

# Workers of `pytest -n auto` share the cores: with several threads each they wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, on every machine. `--hypothesis-profile=explore` draws new ones (.ci/run does).
settings.register_profile("reproducible", derandomize=True)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile("reproducible")


def pytest_addoption(parser):
    parser.addoption("--annotations", action="store_true", help="execute every annotation of hooklens, with its shapes")


def pytest_configure(config):
    if config.getoption("--annotations"):
        annotations.install()


def pytest_sessionstart(session):
    # A shell starts what runs in the background with Ctrl-C ignored, and training leaves it so; tests send it to
    # themselves.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
