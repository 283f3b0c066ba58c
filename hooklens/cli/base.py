"""The command line: parses options, calls a plugin, prints a table, writes a report. Heavy imports happen on demand.

Exit codes: 0 success; 1 a check failed, or an unexpected error occurred; 2 an unusable command or input; 3 something
outside is missing (network, disk, a device, a package); 130 interrupted.
"""

import contextlib
import functools
import inspect
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hooklens.core.errors import ArgumentError, CheckFailed, HooklensError, Refused, Unavailable
from hooklens.core.terminal import printable

# "Input should be a valid integer, unable to parse string as an integer": typer quotes its validator.
_TYPERS_WORDS = re.compile(r"Input should be (.*?)(?:, unable to parse .*)?$")
OK, FAILED, BAD_INPUT, MISSING, INTERRUPTED = 0, 1, 2, 3, 130


_HELP = """Every activation of a transformer by name, and exact patching experiments.

Begin with `hooklens demo`. Exit codes: 0 success; 1 a check failed, or an unexpected error occurred; 2 an unusable
command or input; 3 something outside is missing (network, disk, a device, a package); 130 interrupted."""


class _Group(TyperGroup):
    """Converts an exception of a command into one message and an exit code."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **options: Any) -> Any:
        with _usage_shown():
            for name, value in zip(args, [*args, None][1:], strict=True):
                if (name in _PATHS and value == "") or name.removesuffix("=") in _PATHS - {name}:
                    raise typer.BadParameter(
                        "it is empty, so it names no file; '.' is the current folder", param_hint=name.removesuffix("=")
                    )
            return super().make_context(info_name, args, *more, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _usage_shown():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            say("interrupted")  # its notes are for Python users, such as an argument that keeps finished work
            raise typer.Exit(INTERRUPTED) from error
        except HooklensError as error:
            _fail(ctx, f"error: {_in_options(ctx, error)}", error)
            raise typer.Exit(_code(error)) from error
        except BrokenPipeError:  # the reader of the output closed it: typer ends quietly
            raise
        except (OSError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
            if type(error).__module__.startswith(("click", "typer")):  # usage errors and exits print themselves
                raise
            _fail(ctx, f"unexpected {type(error).__name__}: {error}; `hooklens --debug ...` shows where", error)
            raise typer.Exit(FAILED) from error


@contextmanager
def _usage_shown() -> Iterator[None]:
    """Usage errors print themselves and quote the input: escape anything in it that could act on the terminal."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "message"):
            error.message = printable(_TYPERS_WORDS.sub(r"it must be \1", error.message))
        raise


app = typer.Typer(
    cls=_Group, help=_HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Add a command to the program. A parameter whose type is a dataclass becomes one option for each of its fields.

    A parameter of the command's own takes the place of the field with its name, for another default or help text.
    """
    own = inspect.signature(function).parameters
    groups: dict[str, Any] = {name: p.annotation for name, p in own.items() if is_dataclass(p.annotation)}
    options: dict[str, inspect.Parameter] = {}
    for name, parameter in own.items():
        if name not in groups:
            options[name] = parameter.replace(kind=_NAMED)
            continue
        for field in fields(groups[name]):
            if field.name not in own:
                option = inspect.Parameter(field.name, _NAMED, default=field.default, annotation=field.type)
                options[field.name] = option

    @functools.wraps(function)
    def run(**values: Any) -> None:
        given = {name: values[name] for name in own if name not in groups}
        for name, group in groups.items():
            given[name] = group(**{field.name: values[field.name] for field in fields(group)})
        function(**given)

    for name, option in options.items():
        if "Path" in str(option.annotation):
            _PATHS.update({f"--{name.replace('_', '-')}", *(("-m",) if name == "model" else ())})
    vars(run)["__signature__"] = inspect.Signature(list(options.values()))
    run.__annotations__ = {name: option.annotation for name, option in options.items()}
    return app.command()(run)


_NAMED = inspect.Parameter.KEYWORD_ONLY
_PATHS = set[str]()  # options that name a file or folder; pathlib takes an empty text for the current folder


def _version(asked: bool | None) -> None:
    if asked:
        from importlib.metadata import version

        print(f"hooklens {version('hooklens')}")
        raise typer.Exit(OK)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show where an error was raised.")] = False,
    version: Annotated[
        bool | None, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = None,
) -> None:
    """Options of every command; `_Group` reads `debug`, `_version` the other."""


def main() -> None:
    """The entry point of the `hooklens` command."""
    app(prog_name="hooklens")


def _in_options(ctx: Any, error: HooklensError) -> str:
    """The message with the command's options in place of argument names; options have the names of the arguments."""
    if not isinstance(error, ArgumentError | Refused):
        return str(error)
    command = ctx.command.get_command(ctx, ctx.invoked_subcommand or "")
    options = {option.name: max(option.opts, key=len) for option in command.params}  # --model, not -m
    names = {name: option if option.startswith("-") else option.upper() for name, option in options.items()}
    return error.told({"site": names.get("sites", "site"), **names})


def _code(error: HooklensError) -> int:
    causes = [cause for _, cause in error.errors] if isinstance(error, Refused) else [error]
    for kind, code in ((Unavailable, MISSING), (CheckFailed, FAILED)):
        if all(isinstance(cause, kind) for cause in causes):
            return code
    return BAD_INPUT


def _fail(ctx: Any, message: str, error: Exception) -> None:
    if ctx.params.get("debug"):
        say("".join(traceback.format_exception(error)))
    say(message, *getattr(error, "__notes__", ()))


def say(*lines: str) -> None:
    with contextlib.suppress(OSError):  # a full disk behind standard error must not replace the exit code
        for line in lines:
            typer.echo(printable(line), err=True)
