"""A policy as it was written, every value with its place: what YAML text and Python overrides both become."""

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
class Place:
    """Where a value was written: a line of a file, or an override."""

    label: str  # "rkv.yaml", "override"
    line: int = 0  # from 1; 0 = no file
    column: int = 0
    home: str = ""  # the distribution that brought the file, whose plugins are meant where two have a name

    def at(self, path: str) -> str:
        """`"rkv.yaml:7:11: score[0].queries"` or `"override budget"`."""
        if not self.line:
            return f"{self.label} {path}".rstrip()
        position = f"{self.label}:{self.line}:{self.column}"
        return f"{position}: {path}" if path else position


@attrs.frozen
class Item:
    """One value: a scalar, a list or a mapping of items."""

    value: "Scalar | tuple[Item, ...] | Mapping[str, Item]"
    place: Place
    keys: Mapping[str, Place] = attrs.field(factory=dict)  # where each key of a mapping stands

    @property
    def plain(self) -> object:
        """The value without places, as Python data."""
        if isinstance(self.value, Mapping):
            return {key: item.plain for key, item in self.value.items()}
        if isinstance(self.value, tuple):
            return tuple(item.plain for item in self.value)
        return self.value

    def brought_by(self, home: str) -> "Item":
        """The same, written in a file of the distribution `home`."""
        value = self.value
        if isinstance(value, Mapping):
            value = {key: item.brought_by(home) for key, item in value.items()}
        elif isinstance(value, tuple):
            value = tuple(item.brought_by(home) for item in value)
        return attrs.evolve(self, value=value, place=attrs.evolve(self.place, home=home))

    def only(self, keys: set[str]) -> "Item":
        """A mapping cut down to `keys`; anything else as it is."""
        if not isinstance(self.value, Mapping):
            return self
        return attrs.evolve(self, value={key: item for key, item in self.mapping() if key in keys})

    def mapping(self) -> Iterator[tuple[str, "Item"]]:
        """Keys and items; none for what is not a mapping."""
        yield from self.value.items() if isinstance(self.value, Mapping) else ()


@attrs.define
class Problems:
    """Collects everything that is wrong, so that one run shows all of it."""

    _found: list[tuple[int, int, Problem]] = attrs.field(factory=list, init=False)
    _cause: BaseException | None = attrs.field(default=None, init=False)

    def add(self, place: Place, path: str, message: str, cause: BaseException | None = None) -> None:
        """Note a problem at `place`, with the error that told of it if there is one."""
        self._found.append((place.line, place.column, Problem(place.at(path), message)))
        self._cause = self._cause or cause

    def raise_any(self) -> None:
        """Raise `PolicyError` with all problems in the order of the file, if there are any."""
        if self._found:
            ordered = sorted(self._found, key=lambda found: found[:2])
            raise PolicyError([problem for _, _, problem in ordered]) from self._cause


def below(path: str, key: str | int) -> str:
    """The path of a part: `below("score", 0)` is `"score[0]"`, `below("pool", "size")` is `"pool.size"`."""
    if isinstance(key, str) and _WORD.fullmatch(key) and len(key) <= 60:
        return f"{path}.{key}" if path else key
    return f"{path}[{key if isinstance(key, int) else shown(key)}]"
