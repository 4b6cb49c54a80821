"""Where the command line writes: results to stdout, everything else to stderr."""

import contextlib
import json
import os
import sys
from typing import Any

import typer
from rich.console import Console

_NARROWEST = 20  # columns; below that rich prints nothing that can be read, and at 0 nothing at all


def prepare() -> None:
    """Let this process write any text to any terminal: escapes for what an encoding lacks, and a width above 0."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    for name, least in (("COLUMNS", _NARROWEST), ("LINES", 1)):
        given = os.environ.get(name, "")
        if given.isdigit() and int(given[:9]) < least:
            del os.environ[name]


def silence(stream: Any) -> None:
    """Send what is left in a stream that cannot be written to nowhere: Python would complain of it at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def out() -> Console:
    """For results; made anew, so that it follows a redirected stdout."""
    return Console()


def err() -> Console:
    """For errors and progress."""
    return Console(stderr=True)


def line(text: str, *, error: bool = False) -> None:
    """One line exactly as it is: never wrapped, no markup, whatever the terminal's width."""
    typer.echo(text, err=error)


def tell(text: str) -> None:
    """A step of something that takes long, on stderr."""
    line(text, error=True)


def print_json(value: Any) -> None:
    """A result for programs; in ASCII where stdout takes no more."""
    wide = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    line(json.dumps(value, indent=2, ensure_ascii=not wide))
