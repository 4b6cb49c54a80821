"""The prompt of `kvpolicy run`: an option, a file, or stdin."""

import sys
from pathlib import Path

from kvpolicy.errors import InputError, one_line
from kvpolicy.evaluate.data.files import decoded, read_text


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt exactly as it is given, its last line end included; a file's byte order mark is no part of it.

    Raises InputError when it is missing or empty.
    """
    if text is not None and file is not None:
        raise InputError("give --prompt or --prompt-file, not both")
    where = "--prompt" if text is not None else "stdin" if file is None or str(file) == "-" else str(file)
    prompt = text if text is not None else _stdin() if where == "stdin" else read_text(Path(where))
    if not prompt.strip():
        raise InputError(f"{one_line(where)}: the prompt is empty")
    return prompt


def _stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("no prompt: give --prompt or --prompt-file, or pipe it in")
    return decoded(sys.stdin.buffer.read(), "stdin")  # whatever encoding the terminal has
