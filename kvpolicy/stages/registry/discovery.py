"""Finds the distributions that offer plugins, and brings each in on its own: a broken one breaks no other."""

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
_MOST = 1000  # plugins or policies of one distribution


@attrs.frozen
class Source:
    """One place that plugins come from: an entry point, or the built-in module."""

    name: str  # of the entry point
    distribution: str
    version: str
    load: Callable[[], Any] = attrs.field(repr=False, eq=False)

    def __str__(self) -> str:
        name, owner = one_line(self.name, 100), one_line(f"{self.distribution} {self.version}", 100)
        return f"plugin {name!r} ({owner})"


@attrs.frozen
class Offer:
    """What a source gives."""

    source: Source
    kinds: tuple[type[Plugin], ...]
    policies: dict[str, Path]


@attrs.frozen
class Broken:
    """A source that gives nothing, and why."""

    source: Source
    error: PluginError

    def __str__(self) -> str:
        return str(self.error)


def discover() -> Iterator[Offer | Broken]:
    """Every source in turn, the built-in one first. Imports plugins: never called at `import kvpolicy`."""
    yield _bring_in(built_in())
    by_name: dict[str, list[Source]] = {}
    for source in _allowed(_installed()):
        if normalised(source.distribution) == PROJECT:  # its plugins could not be told from the built-in ones
            error = PluginError(f"{source}: a distribution of this name offers no plugins of its own")
            yield Broken(source, error)
            continue
        by_name.setdefault(source.name, []).append(source)
    for sources in by_name.values():
        yield _clash(sources) if len(sources) > 1 else _bring_in(sources[0])


def built_in() -> Source:
    """The plugins that come with kvpolicy, through the same hook as everyone else's."""
    try:
        version = metadata.version(PROJECT)
    except metadata.PackageNotFoundError:
        version = "not installed"  # run from a source tree
    return Source(PROJECT, PROJECT, version, lambda: importlib.import_module(BUILT_IN))


def normalised(distribution: str) -> str:
    """The name of a distribution as packaging tools compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _installed() -> Iterator[Source]:
    seen = set()
    for distribution in metadata.distributions():
        try:
            points = [point for point in distribution.entry_points if point.group == GROUP]
            name, version = distribution.metadata["Name"], distribution.version
            known = normalised(name)
        except Exception:  # noqa: BLE001, S112 - damaged files of a distribution that need not concern us
            continue
        if points and known not in seen:  # an earlier folder of sys.path hides a later one
            seen.add(known)
            yield from (Source(point.name, name, version, point.load) for point in points)


def _allowed(sources: Iterator[Source]) -> Iterator[Source]:
    listed = os.environ.get(ALLOW)
    names = None if listed is None else {name.strip() for name in listed.split(",")}
    return (source for source in sources if names is None or source.name in names)


def _clash(sources: list[Source]) -> Broken:
    owners = " and ".join(f"{source.distribution} {source.version}" for source in sources)
    message = f"plugin {sources[0].name!r}: two distributions have this entry point, uninstall one: {owners}"
    return Broken(sources[0], PluginError(message))


def _bring_in(source: Source) -> Offer | Broken:
    try:
        hooks = _hooks(source)
        kinds = [admit(kind) for kind in _few(hooks.kvpolicy_stages())]
        packages = _few(hooks.kvpolicy_policies())
        _check_distinct(kinds)
        policies = dict(found for package in packages for found in _policies(package))
        return Offer(source, tuple(kinds), policies)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever a third party's import does, others must work
        broken = PluginError(f"{source}: {described(error)}")
        broken.__cause__ = error
        return Broken(source, broken)


def _few(given: Iterable[Iterable[Any]]) -> list[Any]:
    """All that the hooks of a distribution give, which may come from a generator without end."""
    found = list(itertools.islice(itertools.chain.from_iterable(given), _MOST + 1))
    if len(found) > _MOST:
        raise PluginError(f"a hook gives more than {_MOST} things")
    return found


def _hooks(source: Source) -> Any:
    manager = pluggy.PluginManager(PROJECT)  # one each: pluggy forgets all plugins when one fails
    manager.add_hookspecs(Hooks)
    plugin = source.load()
    manager.register(plugin, source.name)
    manager.check_pending()
    if not manager.get_hookcallers(plugin):
        raise PluginError("has no hook: mark kvpolicy_stages or kvpolicy_policies with @kvpolicy.hookimpl")
    return manager.hook


def _check_distinct(kinds: list[type[Plugin]]) -> None:
    seen: dict[tuple[str, str], type[Plugin]] = {}
    for kind in kinds:
        if seen.setdefault((kind.stage, kind.name), kind) is not kind:
            raise PluginError(f"two plugins of the stage {kind.stage!r} have the name {kind.name!r}")


def _policies(package: str) -> Iterator[tuple[str, Path]]:
    for file in resources.files(package).iterdir():
        if file.name.endswith(".yaml") and isinstance(file, Path):
            yield file.name.removesuffix(".yaml"), file
