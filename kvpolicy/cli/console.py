"""Where the command line writes: results to stdout, everything else to stderr."""

import json
from typing import Any

import typer
from rich.console import Console


def out() -> Console:
    """For results; made anew, so that it follows a redirected stdout."""
    return Console()


def err() -> Console:
    """For errors and progress."""
    return Console(stderr=True)


def line(text: str, *, error: bool = False) -> None:
    """One line exactly as it is: never wrapped, no markup, whatever the terminal's width."""
    typer.echo(text, err=error)


def print_json(value: Any) -> None:
    """A result for programs."""
    line(json.dumps(value, indent=2, ensure_ascii=False))
