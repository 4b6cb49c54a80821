"""On a GPU, kernels are not interpreted, so what counts the bytes they address is left out there."""

import pytest

from kvpolicy_kernels.support import interpreting


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that call `counted` where it cannot count."""
    if interpreting():
        return
    counting = [item for item in items if "counted" in _names(item)]
    config.hook.pytest_deselected(items=counting)
    items[:] = [item for item in items if item not in counting]


def _names(item: pytest.Item) -> tuple[str, ...]:
    return item.function.__code__.co_names if isinstance(item, pytest.Function) else ()
