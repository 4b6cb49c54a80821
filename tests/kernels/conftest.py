"""Which cases are run: a quarter of those of large tests, and on a GPU none that count bytes.

Kernels are slow interpreted, and slow to compile. Every value of every parameter is among the cases that are run. With
KVPOLICY_CASES=all, as in the nightly environment, all are.
"""

import os
import zlib
from collections import Counter
from pathlib import Path
from types import FunctionType

import pytest

from kvpolicy_kernels.common.support import interpreting

MANY = 12  # cases of a test, of which about a quarter are run
ALL = os.environ.get("KVPOLICY_CASES") == "all"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that call `counted`, themselves or by a helper, where it cannot count; else see above."""
    here = Path(__file__).parent
    ours = [item for item in items if isinstance(item, pytest.Function) and here in item.path.parents]
    left_out = set() if interpreting() else {item for item in ours if counts(item.function)}
    if not ALL and len(config.args) < len(ours):  # cases that are named are run
        cases, seen = Counter(item.function for item in ours), set()
        left_out |= {item for item in ours if cases[item.function] >= MANY and adds_nothing(item, seen)}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def adds_nothing(item: pytest.Function, seen: set[tuple[object, str, str]]) -> bool:
    """Whether a case may be left out: by a hash of its name, if every value of its parameters has been seen before."""
    values = {(item.function, name, str(value)) for name, value in item.callspec.params.items()}
    if values <= seen and zlib.crc32(item.name.encode()) % 4:
        return True
    seen |= values
    return False


def counts(function: object) -> bool:
    """Whether a test, or a function that it calls by name, calls `counted`."""
    if not isinstance(function, FunctionType):
        return False
    names = function.__code__.co_names
    called = [function.__globals__.get(name) for name in names]
    helpers = [one for one in called if isinstance(one, FunctionType)]
    return "counted" in names or any("counted" in one.__code__.co_names for one in helpers)
