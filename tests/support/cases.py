"""Which cases of large tests are run: those that bring a new value of a parameter.

Golden vectors and oracles are always run whole. With KVPOLICY_CASES=all, as in the nightly environment, all are; and so
are cases that are named on the command line.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

MANY = 6  # cases of a test that is run in part
FOLDERS = {"faults", "integration", "kernels", "property", "unit"}
ALL = os.environ.get("KVPOLICY_CASES") == "all"


def left_out(items: list[pytest.Item], named: int) -> set[pytest.Item]:
    """Of all items that were collected, for `named` arguments, those that are not run."""
    if ALL or named >= len(items):
        return set()
    folders = [Path(__file__).parents[1] / name for name in FOLDERS]
    ours = [item for item in items if hasattr(item, "callspec") and any(one in item.path.parents for one in folders)]
    cases, seen = Counter(item.function for item in ours), set()
    return {item for item in ours if cases[item.function] >= MANY and adds_nothing(item, seen)}


def adds_nothing(item: pytest.Function, seen: set[tuple[object, str, object]]) -> bool:
    """Whether a case may be left out: every value of its parameters has been seen before."""
    values = {(item.function, name, shown(value)) for name, value in item.callspec.params.items()}
    known = values <= seen
    seen |= values
    return known


def shown(value: object) -> object:
    """What makes two values the same one."""
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - it has a number of thousands of digits in it, or is made to fail so
        return id(value)
