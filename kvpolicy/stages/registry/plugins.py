"""All plugins and policies by name. Filled once, when the first policy is read."""

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
class Record:
    """One plugin, as lists show it."""

    name: str
    stage: str
    distribution: str
    version: str
    kind: type[Plugin]

    @property
    def summary(self) -> str:
        """The first line of the plugin's docstring."""
        return (self.kind.__doc__ or "").strip().partition("\n")[0]

    @property
    def qualified(self) -> str:
        """`distribution:name`, which no other plugin of the stage has."""
        return f"{normalised(self.distribution)}:{self.name}"


@attrs.frozen
class Registry:
    """Finds plugin classes and policy files by the names that policies use."""

    offers: tuple[Offer, ...]
    broken: tuple[Broken, ...]

    def find(self, stage: str, name: str, home: str = "") -> type[Plugin]:
        """The plugin class of `stage` called `name`, or `distribution:name` where two have the name.

        Where two have it, `home` says whose is meant: a policy file that a distribution brings along means its own
        plugins first, then the built-in ones, whatever else is installed beside it.

        Raises:
            PluginError: no such plugin, more than one, or a distribution that should have it is broken.
        """
        found = [one for one in self._of(stage) if name in (one.name, one.qualified)]
        if len(found) > 1 and home:
            nearest = [one for owner in (home, PROJECT) for one in found if normalised(one.distribution) == owner]
            found = nearest[:1] or found
        if len(found) > 1:
            choices = " or ".join(repr(one.qualified) for one in found)
            raise PluginError(f"more than one plugin has the name {shown(name)}; write {choices}")
        if not found:
            raise self._unknown(stage, name) from next(iter(self._suspects(name)), None)
        return found[0].kind

    def names(self, stage: str) -> tuple[str, ...]:
        """What `find` accepts for `stage`, sorted; `distribution:name` where two have the name."""
        return tuple(sorted(_distinct(self._of(stage))))

    def reference(self, kind: type[Plugin]) -> str:
        """The name under which `find` gives `kind`."""
        return self._references.get(kind, kind.name)

    def identity(self, kind: type[Plugin]) -> str:
        """A name for `kind` that does not depend on what else is installed."""
        record = self._records.get(kind)
        return kind.name if record is None or record.distribution == PROJECT else record.qualified

    def owner(self, kind: type[Plugin]) -> str:
        """The distribution that offers `kind`; the project's own for a class that nobody offers."""
        record = self._records.get(kind)
        return PROJECT if record is None else normalised(record.distribution)

    def policies(self) -> dict[str, Path]:
        """The installed policies by name, sorted; `distribution:name` where two have the name."""
        named = [(offer, name) for offer in self.offers for name in offer.policies]
        several = {name for _, name in named if [other for _, other in named].count(name) > 1}
        paths = {}
        for offer, name in named:
            owner = f"{normalised(offer.source.distribution)}:" if name in several else ""
            paths[owner + name] = offer.policies[name]
        return dict(sorted(paths.items()))

    def policy(self, name: str) -> Path | None:
        """The installed policy of that name, or `distribution:name`; None if there is none, or more than one."""
        qualified = {
            f"{normalised(offer.source.distribution)}:{one}": path
            for offer in self.offers
            for one, path in offer.policies.items()
        }
        return self.policies().get(name) or qualified.get(name)

    def home(self, path: Path) -> str:
        """The distribution that brought the policy file, empty for a file of the user's own."""
        homes = (offer.source.distribution for offer in self.offers if path in offer.policies.values())
        return normalised(next(homes, ""))

    def plugins(self) -> tuple[Record, ...]:
        """Every plugin, in the order of the stages, then of their names."""
        return tuple(record for stage in STAGES for _, record in sorted(_distinct(self._of(stage)).items()))

    def _of(self, stage: str) -> list[Record]:
        return [one for one in self._records.values() if one.stage == stage]

    @cached_property
    def _records(self) -> dict[type[Plugin], Record]:
        """By class: policies are written and compared by the names of their plugins, many times over.

        A class that a second distribution offers, too, is the first one's.
        """
        found: dict[type[Plugin], Record] = {}
        for offer in self.offers:
            for kind in offer.kinds:
                record = Record(kind.name, kind.stage, offer.source.distribution, offer.source.version, kind)
                found.setdefault(kind, record)
        return found

    @cached_property
    def _references(self) -> dict[type[Plugin], str]:
        return {record.kind: name for stage in STAGES for name, record in _distinct(self._of(stage)).items()}

    def _suspects(self, name: str) -> list[PluginError]:
        """Why plugins that might have had the name are not there; the entry point of that name first."""
        named = sorted(self.broken, key=lambda one: one.source.name != name)
        return [one.error for one in named]

    def _unknown(self, stage: str, name: str) -> PluginError:
        broken = "".join(f"; not loaded: {error}" for error in self._suspects(name))
        known = did_you_mean(name, self.names(stage), "installed")
        return PluginError(f"unknown name {shown(name)}{known}{broken}")


@functools.cache
def registry() -> Registry:
    """The registry of this process; `registry.cache_clear()` makes the next call look again."""
    found = list(discover())
    offers = tuple(one for one in found if isinstance(one, Offer))
    return Registry(offers, tuple(one for one in found if isinstance(one, Broken)))


def _distinct(records: Iterable[Record]) -> dict[str, Record]:
    listed = list(records)
    names = [record.name for record in listed]
    return {(one.qualified if names.count(one.name) > 1 else one.name): one for one in listed}
