"""The command line, one file per group of commands: each adds its own to `app`, in the order of the help text."""

# isort: off
from hooklens.cli import patch_command, models_command, plugins_command, lens_command  # noqa: F401
from hooklens.cli import heads_command, circuit_command, probe_command, train_command, grok_command  # noqa: F401
from hooklens.cli import register_command  # noqa: F401
from hooklens.cli.base import BAD_INPUT, FAILED, INTERRUPTED, MISSING, OK, app, main

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "MISSING", "OK", "app", "main"]
