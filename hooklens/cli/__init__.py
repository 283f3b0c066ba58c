"""The command line, one file per group of commands: each adds its own to `app`, in the order of the help text."""

# isort: off
from hooklens.cli import demo, patch, models, plugins, lens, heads, circuit, probe, register  # noqa: F401
from hooklens.cli.base import BAD_INPUT, FAILED, INTERRUPTED, MISSING, OK, app, main

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "MISSING", "OK", "app", "main"]
