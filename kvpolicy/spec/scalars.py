"""Values of unquoted YAML scalars. A subset of YAML: no octal or sexagesimal numbers, timestamps or .nan."""

import math
import re

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:[0-9]{1,18}(?:\.[0-9]{0,25})?|\.[0-9]{1,25})(?:[eE][-+]?[0-9]{1,3})?", re.ASCII)
_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "true": True, "false": False}


def resolve(text: str) -> str | int | float | bool | None:
    """The value of an unquoted scalar: null, a bool or a number; any other scalar is text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and not text.lstrip("+-").isdigit():  # 017 is neither octal nor 17
        number = float(text)
        return number if math.isfinite(number) else text
    return text
