"""Settings of the whole suite. pytest also puts this folder on sys.path, so that every test can import `families`."""

import os
import signal

import annotations
import pytest
from hypothesis import settings

# Workers of `pytest -n auto` share the cores: with several threads each they wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, on every machine. `--hypothesis-profile=explore` draws new ones (.ci/run does).
settings.register_profile("reproducible", derandomize=True)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile("reproducible")


#: Of the tests over every kind of model, the default run takes these, which differ most; the slow one takes the others.
QUICK = {"gpt2", "gpt_neox", "llama", "neox", "gemma2", "post", "attn_only"}


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


@pytest.hookimpl(tryfirst=True)  # before -m "not slow" looks
def pytest_collection_modifyitems(items):
    from families import FAMILIES
    from model.zoo import ZOO

    alike = {*FAMILIES, *ZOO} - QUICK
    for item in items:
        given = getattr(item, "callspec", None)
        if given is not None and not alike.isdisjoint(
            value for value in given.params.values() if isinstance(value, str)
        ):
            item.add_marker(pytest.mark.slow)
