"""How every command fails: one line a problem, exit code 2, and a traceback only for those who ask."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from kvpolicy.cli.terminal.console import line, prepare, silence
from kvpolicy.errors import KVPolicyError, described, one_line

TRACEBACK = "--traceback"
FAILED = 2
INTERRUPTED = 130  # 128 and the number of the signal, as shells count
BROKEN_PIPE = 141


class KVPolicyGroup(TyperGroup):
    """The group of all commands. `--traceback` may stand anywhere on the line."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line. What fails outside of a command, such as writing the help, fails alike."""
        prepare()
        try:
            try:
                return super().main(*args, **options)
            finally:
                if sys.stdout is not None:  # it is none when it was closed from outside
                    sys.stdout.flush()
        except OSError as error:  # the help and the version are written before there is a command
            if TRACEBACK in (options.get("args") or sys.argv):
                raise
            sys.exit(_told(error))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        if TRACEBACK in args[:end]:
            args = [TRACEBACK, *(word for index, word in enumerate(args) if word != TRACEBACK or index >= end)]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if ctx.params.get("traceback") or _belongs_to_typer(error):
                raise
            raise typer.Exit(_told(error)) from error


def _belongs_to_typer(error: BaseException) -> bool:
    """Whether it is an error of usage, which typer tells with a hint."""
    return hasattr(error, "exit_code") and hasattr(error, "format_message")


def _told(error: BaseException) -> int:
    """Say on stderr what went wrong; the exit code."""
    if isinstance(error, BrokenPipeError):  # whoever reads the output has seen enough
        silence(sys.stdout)
        return BROKEN_PIPE
    if isinstance(error, OSError) and error.filename is None:  # it may have been stdout itself
        silence(sys.stdout)
    try:
        for problem in _problems(error):
            line(f"error: {problem}", error=True)
    except OSError:  # stderr is full, too
        silence(sys.stderr)
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED


def _problems(error: BaseException) -> list[str]:
    if isinstance(error, KVPolicyError):
        return str(error).splitlines() or [type(error).__name__]
    if isinstance(error, KeyboardInterrupt):
        return ["interrupted"]
    if isinstance(error, OSError) and error.strerror:
        named = "" if error.filename is None else f"{one_line(error.filename)}: "
        return [f"{named}{one_line(error.strerror)}"]
    return [f"{described(error)} (see {TRACEBACK})"]
