"""Memory traffic of a launch in bytes per tensor: shown by `kvpolicy plan`, checked by tests."""

from collections.abc import Iterable, Mapping

import attrs


@attrs.frozen
class Traffic:
    """Bytes that all programs of a launch load and store, by tensor; masked-out elements are not counted."""

    read: Mapping[str, int] = attrs.field(factory=dict)
    written: Mapping[str, int] = attrs.field(factory=dict)
    launches: int = 1

    @classmethod
    def total(cls, parts: "Iterable[Traffic]") -> "Traffic":
        """The sum of several launches."""
        read: dict[str, int] = {}
        written: dict[str, int] = {}
        launches = 0
        for part in parts:
            for totals, counts in ((read, part.read), (written, part.written)):
                for name, count in counts.items():
                    totals[name] = totals.get(name, 0) + count
            launches += part.launches
        return cls(read, written, launches)
