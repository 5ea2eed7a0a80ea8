"""How a click program ends: exit codes, and errors, warnings and log lines as one line each on stderr.

Exit codes: 0; 1 for a failure, a missing package included; 2 for bad usage, any other ConfigError included; 130 for Ctrl-C and
SIGTERM.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import click

from amed_engine.cli.interrupts import INTERRUPTED, STDERR, interruptible
from amed_engine.errors import AmedError, ConfigError, MissingDependency


def run(app: App, args: Sequence[str] | None = None) -> int:
    """The exit code of a program with these arguments, or the process's; what went wrong is printed."""
    name = app.name
    _open_stderr()
    try:
        with _messages(name), interruptible(signal.SIGINT), interruptible(signal.SIGTERM):
            return app.main(args, prog_name=name, standalone_mode=False) or 0
    except click.Abort:
        message, code = "interrupted", INTERRUPTED
    except click.ClickException as error:
        message, code = " ".join(error.format_message().split()), error.exit_code
        if isinstance(error, click.UsageError) and error.ctx:
            message += f" (see {error.ctx.command_path} --help)"
    click.echo(f"{name}: error: {message}", err=True)
    return code


def _open_stderr() -> None:
    """Where it is closed messages go nowhere, and no file of ours gets its number, which libraries print to."""
    if sys.stderr is None:
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, STDERR)
        if handle != STDERR:
            os.close(handle)
        sys.stderr = os.fdopen(STDERR, "w", closefd=False)


class App(click.Group):
    """A group of commands with a flag `debug`, whose exceptions become exit codes and a line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            misuse = isinstance(error, ConfigError) and not isinstance(error, MissingDependency)
            raise (Misuse if misuse else Failure)(_explain(error, ctx)) from error


class Failure(click.ClickException):
    exit_code = 1


class Misuse(click.ClickException):
    exit_code = 2


class Interrupted(click.ClickException):
    exit_code = INTERRUPTED


def _explain(error: Exception, ctx: click.Context) -> str:
    if isinstance(error, AmedError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    first = "".join(f": {line}" for line in str(error).splitlines()[:1])
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}{first}{notes} ({ctx.info_name} --debug shows where)"


@contextlib.contextmanager
def _messages(name: str | None) -> Iterator[None]:
    """Warnings, those in the engine's log too, once each however many batches repeat them."""
    seen: set[str] = set()

    def show(message: object, *_: object) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            click.echo(f"{name}: warning: {message}", err=True)

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: show(record.getMessage())
    handler.addFilter(lambda record: not getattr(record, "reported", False))  # commands print their reports
    logger = logging.getLogger("amed_engine")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        finally:
            logger.removeHandler(handler)
