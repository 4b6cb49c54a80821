"""On a GPU, kernels are not interpreted, so what counts the bytes they address is left out there."""

from types import FunctionType

import pytest

from kvpolicy_kernels.common.support import interpreting


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that call `counted`, themselves or by a helper, where it cannot count."""
    if interpreting():
        return
    counting = [item for item in items if isinstance(item, pytest.Function) and counts(item.function)]
    config.hook.pytest_deselected(items=counting)
    items[:] = [item for item in items if item not in counting]


def counts(function: object) -> bool:
    """Whether a test, or a function that it calls by name, calls `counted`."""
    if not isinstance(function, FunctionType):
        return False
    names = function.__code__.co_names
    called = [function.__globals__.get(name) for name in names]
    helpers = [one for one in called if isinstance(one, FunctionType)]
    return "counted" in names or any("counted" in one.__code__.co_names for one in helpers)
