"""A measured number and the threshold that is claimed or aimed at."""

from collections.abc import Mapping
from typing import Any

import attrs


@attrs.frozen
class Verdict:
    """One gate: a number and the threshold that it should not be below (or above); None = there is none.

    `claimed` says whether that is a claim, which has to hold, or an aim. `floor` is what nothing that does the same
    products and reads the same bytes gets below (or above), timed in the same run.
    """

    gate: str
    claim: str
    value: float
    threshold: float | None
    at_most: bool = False
    noise: float | None = None
    claimed: bool = True
    floor: float | None = None

    @property
    def met(self) -> bool:
        """Whether the threshold is reached; NaN reaches none."""
        if self.threshold is None:
            return True
        return self.value <= self.threshold if self.at_most else self.value >= self.threshold

    @property
    def passed(self) -> bool:
        """An aim may be missed."""
        return self.met or not self.claimed

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**attrs.asdict(self), "passed": self.passed}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Verdict":
        """What `to_dict` gave."""
        return cls(**{name: value for name, value in data.items() if name != "passed"})
