"""The bytes that a launch addresses, per tensor: what `kvpolicy plan` shows, and what a test counts."""

from collections.abc import Iterable, Mapping

import attrs


@attrs.frozen
class Traffic:
    """Bytes of the elements that all programs of a launch load and store, masked-out ones left out, by tensor."""

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
            for into, counts in ((read, part.read), (written, part.written)):
                for name, count in counts.items():
                    into[name] = into.get(name, 0) + count
            launches += part.launches
        return cls(read, written, launches)
