"""A measured number and the threshold that is claimed for it."""

from collections.abc import Mapping
from typing import Any

import attrs


@attrs.frozen
class Verdict:
    """One gate: a number and the threshold that it must not be below (or above); None = no claim."""

    gate: str
    claim: str
    value: float
    threshold: float | None
    at_most: bool = False
    noise: float | None = None

    @property
    def passed(self) -> bool:
        """NaN fails."""
        if self.threshold is None:
            return True
        return self.value <= self.threshold if self.at_most else self.value >= self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**attrs.asdict(self), "passed": self.passed}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Verdict":
        """What `to_dict` gave."""
        return cls(**{name: value for name, value in data.items() if name != "passed"})
