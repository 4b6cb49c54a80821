"""Tables of one number for each layer and head, as some authors publish what they have trained or measured."""

import itertools
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import CalibrationError, one_line, shown

_LARGEST = 2**24  # bytes: five times the largest that was published, of 390 runs of 1600 heads
_PLACE = re.compile(r"(0|[1-9][0-9]{0,5})-(0|[1-9][0-9]{0,5})", re.ASCII)


def read_head_table(path: "str | os.PathLike[str]") -> Tensor:
    """Float64 [L, heads], from a file in one of two formats.

    - A line a layer, a column a head, separated by tabs or spaces; empty lines are left out.
    - JSON: `{"layer-head": [score of each run, ...], ...}` in any order, every layer and head once, scores not
      negative; a head has the mean over its runs (the format of arXiv:2404.15574, which HeadKV has taken over).

    Raises CalibrationError, which names the place, for a file that cannot be read or is no such table.
    """
    name = one_line(os.fsdecode(path))
    text = _text(Path(path), name)
    rows = _of_runs(text, name) if text.lstrip().startswith("{") else _of_lines(text, name)
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


def _of_lines(text: str, name: str) -> list[list[float]]:
    rows: list[list[float]] = []
    for number, line in enumerate(text.splitlines(), 1):
        numbers = [_number(word, f"{name}:{number}:{column}") for column, word in enumerate(line.split(), 1)]
        if numbers and rows and len(numbers) != len(rows[0]):
            raise CalibrationError(
                f"{name}:{number}: must have {len(rows[0])} numbers, as the first line: {len(numbers)}"
            )
        if numbers:
            rows.append(numbers)
    if not rows:
        raise CalibrationError(f"{name}: must have a line of numbers for each layer: it is empty")
    return rows


def _number(word: str, place: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise CalibrationError(f"{place}: must be a finite number: {shown(word)}")
    return number


def _of_runs(text: str, name: str) -> list[list[float]]:
    try:
        # Pairs in place of mappings: a name that comes twice would otherwise be taken once.
        entries: tuple[tuple[str, Any], ...] = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{name}: must be one JSON mapping: {one_line(error)}") from error
    if not entries:
        raise CalibrationError(f"{name}: must have scores for each layer and head: it is empty")
    means: dict[tuple[int, int], float] = {}
    for key, runs in entries:
        found = _PLACE.fullmatch(key)
        if found is None:
            raise CalibrationError(f"{name}: must name a layer and a head, such as '0-31': {shown(key)}")
        place = int(found[1]), int(found[2])
        if place in means:
            raise CalibrationError(f"{name}: {shown(key)}: must be there once")
        means[place] = _mean(runs, f"{name}: {shown(key)}")
    layers, heads = (1 + max(place[axis] for place in means) for axis in (0, 1))
    for layer, head in itertools.product(range(layers), range(heads)):
        if (layer, head) not in means:
            raise CalibrationError(f"{name}: '{layer}-{head}': is missing, of {layers} layers of {heads} heads")
    return [[means[layer, head] for head in range(heads)] for layer in range(layers)]


def _mean(runs: Any, place: str) -> float:
    if not isinstance(runs, list) or not runs:
        told = dict(runs) if isinstance(runs, tuple) else runs
        raise CalibrationError(f"{place}: must be a list of the scores of one run or more: {shown(told)}")
    for number, score in enumerate(runs, 1):
        if type(score) not in (int, float) or not 0 <= score <= sys.float_info.max:
            raise CalibrationError(f"{place}: run {number}: must be a finite number >= 0: {shown(score)}")
    # By parts, so that no sum is infinite; rounding of parts may add up to more than the largest score.
    mean: float = min(sum(score / len(runs) for score in runs), float(max(runs)))
    return mean
