"""A policy as it was written: values with their positions, from YAML text or Python overrides."""

import re
from collections.abc import Iterator, Mapping

import attrs

from kvpolicy.errors import PolicyError, Problem, shown

MAX_BYTES = 64 * 1024
MAX_EVENTS = 2048
MAX_DEPTH = 16
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)

Scalar = str | int | float | bool | None


@attrs.frozen
class SourcePosition:
    """Where a value was written: line and column of a file, or an override."""

    label: str  # "rkv.yaml", "override"
    line: int = 0  # from 1; 0 = no file
    column: int = 0
    distribution: str = ""  # that contains the file; its plugins are preferred if several have the same name

    def at(self, path: str) -> str:
        """`"rkv.yaml:7:11: score[0].queries"` or `"override budget"`."""
        if not self.line:
            return f"{self.label} {path}".rstrip()
        prefix = f"{self.label}:{self.line}:{self.column}"
        return f"{prefix}: {path}" if path else prefix


@attrs.frozen
class Item:
    """One value: a scalar, a list or a mapping of items."""

    value: "Scalar | tuple[Item, ...] | Mapping[str, Item]"
    position: SourcePosition
    keys: Mapping[str, SourcePosition] = attrs.field(factory=dict)  # positions of the keys of a mapping

    @property
    def plain(self) -> object:
        """The value as Python data, without positions."""
        if isinstance(self.value, Mapping):
            return {key: item.plain for key, item in self.value.items()}
        if isinstance(self.value, tuple):
            return tuple(item.plain for item in self.value)
        return self.value

    def from_distribution(self, distribution: str) -> "Item":
        """A copy, as if it was written in a file of this distribution."""
        value = self.value
        if isinstance(value, Mapping):
            value = {key: item.from_distribution(distribution) for key, item in value.items()}
        elif isinstance(value, tuple):
            value = tuple(item.from_distribution(distribution) for item in value)
        return attrs.evolve(self, value=value, position=attrs.evolve(self.position, distribution=distribution))

    def only(self, keys: set[str]) -> "Item":
        """A mapping with only those of its keys that are in `keys`; other values unchanged."""
        if not isinstance(self.value, Mapping):
            return self
        return attrs.evolve(self, value={key: item for key, item in self.mapping() if key in keys})

    def mapping(self) -> Iterator[tuple[str, "Item"]]:
        """Keys and items; nothing if the value is not a mapping."""
        yield from self.value.items() if isinstance(self.value, Mapping) else ()


@attrs.define
class Problems:
    """Collects the errors of a policy, so that one run reports all of them."""

    _located: list[tuple[int, int, Problem]] = attrs.field(factory=list, init=False)
    _cause: BaseException | None = attrs.field(default=None, init=False)

    def add(self, position: SourcePosition, path: str, message: str, cause: BaseException | None = None) -> None:
        """Add a problem at `position`; `cause` is the exception that reported it, if any."""
        self._located.append((position.line, position.column, Problem(position.at(path), message)))
        self._cause = self._cause or cause

    def raise_any(self) -> None:
        """Raise PolicyError with all problems, in the order of the file, if there are any."""
        if self._located:
            ordered = sorted(self._located, key=lambda located: located[:2])
            raise PolicyError([problem for _, _, problem in ordered]) from self._cause


def below(path: str, key: str | int) -> str:
    """The path of a member: `below("score", 0)` is `"score[0]"`, `below("pool", "size")` is `"pool.size"`."""
    if isinstance(key, str) and _WORD.fullmatch(key) and len(key) <= 60:
        return f"{path}.{key}" if path else key
    return f"{path}[{key if isinstance(key, int) else shown(key)}]"
