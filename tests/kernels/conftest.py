"""On a GPU no test that counts bytes is run: only Triton's interpreter can count them."""

from pathlib import Path
from types import FunctionType

import pytest

from kvpolicy_kernels.common.support import interpreting


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that call `counted`, themselves or by a helper, where it cannot count."""
    here = Path(__file__).parent
    ours = [item for item in items if isinstance(item, pytest.Function) and here in item.path.parents]
    left_out = set() if interpreting() else {item for item in ours if counts(item.function)}
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
