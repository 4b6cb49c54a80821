"""Tables of one number for each layer and KV head, as some authors publish what they have trained or measured."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from kvpolicy.errors import CalibrationError, one_line, shown

_LARGEST = 2**20  # bytes: ten times what a model of a hundred layers and heads needs


def read_head_table(path: "str | os.PathLike[str]") -> Tensor:
    """Float64 [L, K]: a line a layer, a column a KV head, separated by tabs or spaces; empty lines are left out.

    Raises CalibrationError, which names the place, for a file that cannot be read or is no such table.
    """
    name = one_line(os.fsdecode(path))
    rows: list[list[float]] = []
    for number, line in enumerate(_text(Path(path), name).splitlines(), 1):
        numbers = [_number(word, f"{name}:{number}:{column}") for column, word in enumerate(line.split(), 1)]
        if numbers and rows and len(numbers) != len(rows[0]):
            raise CalibrationError(
                f"{name}:{number}: must have {len(rows[0])} numbers, as the first line: {len(numbers)}"
            )
        if numbers:
            rows.append(numbers)
    if not rows:
        raise CalibrationError(f"{name}: must have a line of numbers for each layer: it is empty")
    return torch.tensor(rows, dtype=torch.float64)


def _text(path: Path, name: str) -> str:
    try:
        if path.exists() and not path.is_file():  # a pipe may never end
            raise CalibrationError(f"{name}: is no regular file")
        if path.stat().st_size > _LARGEST:
            raise CalibrationError(f"{name}: is larger than any table of heads")
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:  # ValueError: a NUL in a path, or no UTF-8
        raise CalibrationError(f"{name}: cannot be read: {one_line(error)}") from error


def _number(word: str, place: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise CalibrationError(f"{place}: must be a finite number: {shown(word)}")
    return number
