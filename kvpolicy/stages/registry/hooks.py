"""The hooks that a distribution implements to offer plugins and policies.

A distribution names a module in the entry-point group `kvpolicy`; the module defines one or both functions
below and marks each with `@kvpolicy.hookimpl`. The built-in plugins use the same hooks.
"""

from collections.abc import Iterable

import pluggy

from kvpolicy.stages.contracts import Plugin

PROJECT = "kvpolicy"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """Called once, when the registry is first needed; never while a model runs."""

    @hookspec
    def kvpolicy_stages(self) -> Iterable[type[Plugin]]:  # type: ignore[empty-body]
        """The plugin classes of this distribution, of any stage."""

    @hookspec
    def kvpolicy_policies(self) -> Iterable[str]:  # type: ignore[empty-body]
        """Names of packages whose `*.yaml` files are policies, found by file name."""
