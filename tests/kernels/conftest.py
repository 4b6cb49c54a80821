"""Which cases are run: on a GPU none that count bytes; interpreted, which is slow, half of the cases of large tests.

With KVPOLICY_CASES=all, as in the nightly environment, all of them are run interpreted, too.
"""

import os
import zlib
from collections import Counter
from pathlib import Path
from types import FunctionType

import pytest

from kvpolicy_kernels.common.support import interpreting

MANY = 12  # cases of a test, of which half are enough to see each value of each parameter
ALL = os.environ.get("KVPOLICY_CASES") == "all"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that call `counted`, themselves or by a helper, where it cannot count; else see above."""
    here = Path(__file__).parent
    ours = [item for item in items if isinstance(item, pytest.Function) and here in item.path.parents]
    if not interpreting():
        left_out = {item for item in ours if counts(item.function)}
    elif not ALL and len(config.args) < len(ours):  # cases that are named are run
        cases = Counter(item.function for item in ours)
        left_out = {item for item in ours if cases[item.function] >= MANY and zlib.crc32(item.nodeid.encode()) % 2}
    else:
        return
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def counts(function: object) -> bool:
    """Whether a test, or a function that it calls by name, calls `counted`."""
    if not isinstance(function, FunctionType):
        return False
    names = function.__code__.co_names
    called = [function.__globals__.get(name) for name in names]
    helpers = [one for one in called if isinstance(one, FunctionType)]
    return "counted" in names or any("counted" in one.__code__.co_names for one in helpers)
