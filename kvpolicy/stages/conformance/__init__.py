"""What every plugin must pass. For authors of plugins: run it on your own under pytest.

    import pytest
    from kvpolicy.stages.conformance import conformance_cases

    CASES = conformance_cases(MyScorer(strength=2))

    @pytest.mark.parametrize("check", [check for _, check in CASES], ids=[name for name, _ in CASES])
    def test_contract(check):
        check()

Each check raises `kvpolicy.errors.PluginContractError`, which says what was expected and what was found.

A scorer with a tile function has a case `tile gives what score gives`. It needs a GPU, or TRITON_INTERPRET=1 in the
environment before Triton is imported. Where nothing can run a tile, the case is called `tile is not compared with
score`, with the reason, and passes.
"""

import functools
from collections.abc import Callable
from typing import Any

from kvpolicy.errors import PluginContractError, described
from kvpolicy.stages.checking.returned import contract_error
from kvpolicy.stages.conformance import (
    allocators,
    calibrations,
    codecs,
    every,
    mergers,
    observers,
    passes,
    readers,
    scorers,
    selectors,
    tiles,
)
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.contracts import Plugin

__all__ = ["Promises", "check_plugin", "conformance_cases"]

_CHECKS: dict[str, tuple[Callable[[Any, Promises], None], ...]] = {
    "score": (*observers.CHECKS, *passes.CHECKS, *calibrations.CHECKS, *scorers.CHECKS, *tiles.CHECKS),
    "allocate.layers": allocators.CHECKS,
    "allocate.heads": (*calibrations.CHECKS, *allocators.CHECKS),
    "allocate.joint": (*calibrations.CHECKS, *allocators.CHECKS),
    "select": selectors.CHECKS,
    "merge": (*observers.CHECKS, *mergers.CHECKS),
    "store": codecs.CHECKS,
    "read": readers.CHECKS,
}


def conformance_cases(plugin: Plugin, promises: Promises | None = None) -> list[tuple[str, Callable[[], None]]]:
    """Name and check of every case that applies to `plugin`; `promises` says what it claims beyond its contract."""
    checks = (*every.CHECKS, *_CHECKS.get(plugin.stage, ()))
    named = [(check.__name__.replace("_", " "), check) for check in checks]
    known = promises or Promises()
    return [(name, functools.partial(_run, check, plugin, known)) for name, check in [*named, *tiles.cases(plugin)]]


def check_plugin(plugin: Plugin, promises: Promises | None = None) -> None:
    """Runs all cases.

    Raises:
        PluginContractError: with all that is wrong, one line each.
    """
    wrong = []
    for name, check in conformance_cases(plugin, promises):
        try:
            check()
        except PluginContractError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        raise PluginContractError("\n".join(wrong))


def _run(check: Callable[[Any, Promises], None], plugin: Plugin, promises: Promises) -> None:
    try:
        check(plugin, promises)
    except PluginContractError:
        raise
    except Exception as error:
        raise contract_error(plugin, f"raised {described(error)}") from error
