"""Reads text files; every failure is an InputError."""

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
