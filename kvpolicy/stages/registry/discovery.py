"""Finds distributions with plugins and loads each of them separately: an error in one does not affect others."""

import importlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import attrs
import pluggy

from kvpolicy.errors import PluginError, described, one_line
from kvpolicy.stages.contracts import Plugin
from kvpolicy.stages.registry.admission import admit
from kvpolicy.stages.registry.hooks import PROJECT, Hooks

GROUP = "kvpolicy"
ALLOW = "KVPOLICY_PLUGINS"
BUILT_IN = "kvpolicy_plugins"
_MAX_OFFERS = 1000  # plugins or policies of one distribution


@attrs.frozen
class Source:
    """A source of plugins: an entry point, or the built-in module."""

    name: str  # of the entry point
    distribution: str
    version: str
    load: Callable[[], Any] = attrs.field(repr=False, eq=False)

    def __str__(self) -> str:
        name, owner = one_line(self.name, 100), one_line(f"{self.distribution} {self.version}", 100)
        return f"plugin {name!r} ({owner})"


@attrs.frozen
class Offer:
    """Plugins and policies of a source."""

    source: Source
    plugin_classes: tuple[type[Plugin], ...]
    policies: dict[str, Path]


@attrs.frozen
class Broken:
    """A source that cannot be loaded, and the error."""

    source: Source
    error: PluginError

    def __str__(self) -> str:
        return str(self.error)


def discover() -> Iterator[Offer | Broken]:
    """All sources, the built-in one first. Imports plugins, so it is not called at `import kvpolicy`."""
    yield _load(built_in())
    by_name: dict[str, list[Source]] = {}
    for source in _allowed(_installed()):
        if normalised(source.distribution) == PROJECT:  # its plugins would have the names of the built-in ones
            error = PluginError(f"{source}: a distribution of this name cannot offer plugins")
            yield Broken(source, error)
            continue
        by_name.setdefault(source.name, []).append(source)
    for sources in by_name.values():
        yield _clash(sources) if len(sources) > 1 else _load(sources[0])


def built_in() -> Source:
    """The source of the built-in plugins, loaded through the same hooks as others."""
    try:
        version = metadata.version(PROJECT)
    except metadata.PackageNotFoundError:
        version = "not installed"  # run from a source tree
    return Source(PROJECT, PROJECT, version, lambda: importlib.import_module(BUILT_IN))


def normalised(distribution: str) -> str:
    """The normalised name of a distribution, as packaging tools compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _installed() -> Iterator[Source]:
    seen = set()
    for distribution in metadata.distributions():
        try:
            entry_points = [entry_point for entry_point in distribution.entry_points if entry_point.group == GROUP]
            name, version = distribution.metadata["Name"], distribution.version
            key = normalised(name)
        except Exception:  # noqa: BLE001, S112 - damaged metadata of any installed distribution
            continue
        if entry_points and key not in seen:  # an earlier folder of sys.path hides a later one
            seen.add(key)
            yield from (Source(entry_point.name, name, version, entry_point.load) for entry_point in entry_points)


def _allowed(sources: Iterator[Source]) -> Iterator[Source]:
    setting = os.environ.get(ALLOW)
    names = None if setting is None else {name.strip() for name in setting.split(",")}
    return (source for source in sources if names is None or source.name in names)


def _clash(sources: list[Source]) -> Broken:
    owners = " and ".join(f"{source.distribution} {source.version}" for source in sources)
    message = f"plugin {sources[0].name!r}: two distributions have this entry point, uninstall one: {owners}"
    return Broken(sources[0], PluginError(message))


def _load(source: Source) -> Offer | Broken:
    try:
        hooks = _hooks(source)
        plugin_classes = [admit(plugin_class) for plugin_class in _bounded_list(hooks.kvpolicy_stages())]
        packages = _bounded_list(hooks.kvpolicy_policies())
        _check_distinct(plugin_classes)
        policies = dict(policy for package in packages for policy in _policies(package))
        return Offer(source, tuple(plugin_classes), policies)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - an import of a third party may raise anything
        broken = PluginError(f"{source}: {described(error)}")
        broken.__cause__ = error
        return Broken(source, broken)


def _bounded_list(results: Iterable[Iterable[Any]]) -> list[Any]:
    """The results of all hooks of a distribution; an error if there are too many, as from an endless generator."""
    items = list(itertools.islice(itertools.chain.from_iterable(results), _MAX_OFFERS + 1))
    if len(items) > _MAX_OFFERS:
        raise PluginError(f"hooks return more than {_MAX_OFFERS} items")
    return items


def _hooks(source: Source) -> Any:
    manager = pluggy.PluginManager(PROJECT)  # one manager per source: pluggy drops all plugins when one fails
    manager.add_hookspecs(Hooks)
    plugin = source.load()
    manager.register(plugin, source.name)
    manager.check_pending()
    if not manager.get_hookcallers(plugin):
        raise PluginError("has no hook: mark kvpolicy_stages or kvpolicy_policies with @kvpolicy.hookimpl")
    return manager.hook


def _check_distinct(plugin_classes: list[type[Plugin]]) -> None:
    first: dict[tuple[str, str], type[Plugin]] = {}
    for plugin_class in plugin_classes:
        if first.setdefault((plugin_class.stage, plugin_class.name), plugin_class) is not plugin_class:
            raise PluginError(f"two plugins of the stage {plugin_class.stage!r} have the name {plugin_class.name!r}")


def _policies(package: str) -> Iterator[tuple[str, Path]]:
    for file in resources.files(package).iterdir():
        if file.name.endswith(".yaml") and isinstance(file, Path):
            yield file.name.removesuffix(".yaml"), file
