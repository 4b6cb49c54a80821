"""Look-up of plugins and policies by name. The registry is filled once, when the first policy is read."""

import functools
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import attrs

from kvpolicy.errors import PluginError, did_you_mean, shown
from kvpolicy.stages.contracts import STAGES, Plugin
from kvpolicy.stages.registry.discovery import Broken, Offer, discover, normalised
from kvpolicy.stages.registry.hooks import PROJECT


@attrs.frozen
class RegisteredPlugin:
    """A plugin class with its name, stage and distribution."""

    name: str
    stage: str
    distribution: str
    version: str
    kind: type[Plugin]  # the plugin class

    @property
    def summary(self) -> str:
        """The first line of the plugin's docstring."""
        return (self.kind.__doc__ or "").strip().partition("\n")[0]

    @property
    def qualified(self) -> str:
        """`distribution:name`, unique within the stage."""
        return f"{normalised(self.distribution)}:{self.name}"


@attrs.frozen
class Registry:
    """Plugin classes and policy files by name."""

    offers: tuple[Offer, ...]
    broken: tuple[Broken, ...]

    def find(self, stage: str, name: str, distribution: str = "") -> type[Plugin]:
        """The plugin class of `stage` with this name, or with this `distribution:name`.

        If several plugins have the name, those of `distribution` are preferred, then the built-in ones: a policy file
        of a distribution uses its own plugins, independent of what else is installed.

        Raises:
            PluginError: no plugin has the name, or several have it; lists distributions that could not be loaded.
        """
        matches = [plugin for plugin in self._of(stage) if name in (plugin.name, plugin.qualified)]
        if len(matches) > 1 and distribution:
            preferred = [
                plugin
                for owner in (distribution, PROJECT)
                for plugin in matches
                if normalised(plugin.distribution) == owner
            ]
            matches = preferred[:1] or matches
        if len(matches) > 1:
            choices = " or ".join(repr(plugin.qualified) for plugin in matches)
            raise PluginError(f"more than one plugin has the name {shown(name)}; write {choices}")
        if not matches:
            raise self._unknown(stage, name) from next(iter(self._load_errors(name)), None)
        return matches[0].kind

    def names(self, stage: str) -> tuple[str, ...]:
        """Sorted names of the plugins of `stage`; `distribution:name` for names that several plugins have."""
        return tuple(sorted(_distinct(self._of(stage))))

    def reference(self, plugin_class: type[Plugin]) -> str:
        """The name with which `find` returns `plugin_class`."""
        return self._references.get(plugin_class, plugin_class.name)

    def identity(self, plugin_class: type[Plugin]) -> str:
        """A name of `plugin_class` that does not depend on what else is installed."""
        plugin = self._by_class.get(plugin_class)
        return plugin_class.name if plugin is None or plugin.distribution == PROJECT else plugin.qualified

    def owner(self, plugin_class: type[Plugin]) -> str:
        """The distribution of `plugin_class`; `kvpolicy` for a class that is not registered."""
        plugin = self._by_class.get(plugin_class)
        return PROJECT if plugin is None else normalised(plugin.distribution)

    def policies(self) -> dict[str, Path]:
        """Installed policies, sorted by name; `distribution:name` for names that several policies have."""
        named = [(offer, name) for offer in self.offers for name in offer.policies]
        ambiguous = {name for _, name in named if [other for _, other in named].count(name) > 1}
        paths = {}
        for offer, name in named:
            owner = f"{normalised(offer.source.distribution)}:" if name in ambiguous else ""
            paths[owner + name] = offer.policies[name]
        return dict(sorted(paths.items()))

    def policy(self, name: str) -> Path | None:
        """The installed policy of this name or `distribution:name`; None if there is none, or several."""
        qualified = {
            f"{normalised(offer.source.distribution)}:{policy_name}": path
            for offer in self.offers
            for policy_name, path in offer.policies.items()
        }
        return self.policies().get(name) or qualified.get(name)

    def distribution_of(self, path: Path) -> str:
        """The distribution of an installed policy file; empty for other files."""
        distributions = (offer.source.distribution for offer in self.offers if path in offer.policies.values())
        return normalised(next(distributions, ""))

    def plugins(self) -> tuple[RegisteredPlugin, ...]:
        """All plugins, ordered by stage, then by name."""
        return tuple(plugin for stage in STAGES for _, plugin in sorted(_distinct(self._of(stage)).items()))

    def _of(self, stage: str) -> list[RegisteredPlugin]:
        return [plugin for plugin in self._by_class.values() if plugin.stage == stage]

    @cached_property
    def _by_class(self) -> dict[type[Plugin], RegisteredPlugin]:
        """Registered plugins by class. If several distributions offer a class, it belongs to the first."""
        plugins: dict[type[Plugin], RegisteredPlugin] = {}
        for offer in self.offers:
            for plugin_class in offer.plugin_classes:
                source = offer.source
                plugin = RegisteredPlugin(
                    plugin_class.name, plugin_class.stage, source.distribution, source.version, plugin_class
                )
                plugins.setdefault(plugin_class, plugin)
        return plugins

    @cached_property
    def _references(self) -> dict[type[Plugin], str]:
        return {plugin.kind: name for stage in STAGES for name, plugin in _distinct(self._of(stage)).items()}

    def _load_errors(self, name: str) -> list[PluginError]:
        """Errors of sources that could not be loaded; first that of the entry point with this name, if any."""
        ordered = sorted(self.broken, key=lambda source: source.source.name != name)
        return [source.error for source in ordered]

    def _unknown(self, stage: str, name: str) -> PluginError:
        broken = "".join(f"; not loaded: {error}" for error in self._load_errors(name))
        known = did_you_mean(name, self.names(stage), "installed")
        return PluginError(f"unknown name {shown(name)}{known}{broken}")


@functools.cache
def registry() -> Registry:
    """The registry of this process; after `registry.cache_clear()` the next call repeats the discovery."""
    sources = list(discover())
    offers = tuple(source for source in sources if isinstance(source, Offer))
    return Registry(offers, tuple(source for source in sources if isinstance(source, Broken)))


def _distinct(plugins: Iterable[RegisteredPlugin]) -> dict[str, RegisteredPlugin]:
    all_plugins = list(plugins)
    names = [plugin.name for plugin in all_plugins]
    return {(plugin.qualified if names.count(plugin.name) > 1 else plugin.name): plugin for plugin in all_plugins}
