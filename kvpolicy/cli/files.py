"""Reads and writes text files; every failure is an InputError."""

import os
from pathlib import Path

from kvpolicy.errors import InputError, one_line

LARGEST = 2**28  # bytes; more text than a prompt or a calibration can use


def read_text(path: Path) -> str:
    """The text of a file, exactly, but without a byte order mark. Raises InputError.

    Folders, pipes and devices are refused: some never end.
    """
    name = one_line(path)
    try:
        if not path.is_file():
            raise InputError(f"{name}: {'is no regular file' if path.exists() else 'no such file'}")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except ValueError as error:  # a NUL in the path
        raise InputError(f"{name}: no such file") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    if len(data) > LARGEST:
        raise InputError(f"{name}: must be at most {LARGEST // 2**20} MiB")
    return decoded(data, name)


def decoded(data: bytes, name: str) -> str:
    """UTF-8 text without a byte order mark; line ends stay as they are. Raises InputError."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: must be UTF-8: {error.reason} at byte {error.start}") from error


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
