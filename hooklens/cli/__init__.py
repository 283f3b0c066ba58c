"""The command line, one file per group of commands: each adds its own to `app`, in the order of the help text."""

# isort: off
from hooklens.cli import (
    demo_command as demo,
    patch_command as patch,
    models_command as models,
    plugins_command as plugins,
    lens_command as lens,
    heads_command as heads,
    circuit_command as circuit,
    probe_command as probe,
    register_command as register,
)  # noqa: F401
from hooklens.cli.base import BAD_INPUT, FAILED, INTERRUPTED, MISSING, OK, app, main

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "MISSING", "OK", "app", "main"]
