"""The prompt of `kvpolicy run`: an option, a file, or stdin."""

import sys
from pathlib import Path

from kvpolicy.errors import InputError


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt, without the line end that editors put behind it. Raises InputError when it is missing or empty."""
    if text is not None and file is not None:
        raise InputError("give --prompt or --prompt-file, not both")
    where = "--prompt" if text is not None else "stdin" if file is None or str(file) == "-" else str(file)
    prompt = text if text is not None else _stdin() if where == "stdin" else _file(Path(where))
    prompt = prompt.rstrip("\r\n")
    if not prompt.strip():
        raise InputError(f"{where}: the prompt is empty")
    return prompt


def _stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("no prompt: give --prompt or --prompt-file, or pipe it in")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"stdin: must be UTF-8: {error.reason}") from error


def _file(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8: {error.reason} at byte {error.start}") from error
