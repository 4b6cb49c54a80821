"""Writes text files and makes folders; every failure is an InputError."""

import os
from pathlib import Path

from kvpolicy.errors import InputError, one_line


def write_text(path: Path, text: str) -> None:
    """Write a file, or to a device. Raises InputError when that cannot be done, a pipe that nobody reads included."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NONBLOCK", 0), 0o666)
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{one_line(path)}: cannot be written: {reason}") from error


def make_folder(path: Path, what: str = "") -> None:
    """Make a folder now: an hour of results must not be lost to a mistyped name. Raises InputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{what}{one_line(path)}: cannot be made: {reason}") from error
