"""One comparison: everything that was timed together, at one length."""

from collections.abc import Mapping
from statistics import median
from typing import Any

import attrs

from kvpolicy.bench.protocol.samples import P99, noise, paired_ratio, quantile

OURS, AGAIN = "ours", "ours again"


def again(name: str) -> str:
    """The name under which a contender is timed for the second time: what both differ by is noise."""
    return f"{name} again"


@attrs.frozen
class Case:
    """Samples are in seconds, one a round, for `parts` layers (or one step, or one token). Floors are in seconds."""

    what: str  # a policy's name
    length: int  # tokens of context
    samples: Mapping[str, tuple[float, ...]]
    floors: Mapping[str, float] = attrs.field(factory=dict)
    parts: int = 1
    shape: Mapping[str, Any] = attrs.field(factory=dict)
    facts: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def baselines(self) -> tuple[str, ...]:
        """What ours is compared with."""
        return tuple(name for name in self.samples if name not in (OURS, AGAIN))

    @property
    def noise(self) -> float | None:
        """What two timings of ours differ by; None when it was timed once."""
        if AGAIN not in self.samples:
            return None
        return noise(self.samples[AGAIN], self.samples[OURS])

    @property
    def floor(self) -> float:
        """Seconds below which no implementation gets; 0 when none is known."""
        return max(self.floors.values(), default=0.0)

    def seconds(self, name: str) -> float:
        """Median of a variant, for one part."""
        return median(self.samples[name]) / self.parts

    def tail(self, name: str) -> float:
        """99th percentile of a variant, for one part."""
        return quantile(self.samples[name], P99) / self.parts

    def ratio(self, name: str) -> float:
        """How many times faster ours is than `name`."""
        return paired_ratio(self.samples[name], self.samples[OURS])

    def of_floor(self, name: str = OURS) -> float | None:
        """The floor as a share of a variant's time; None without a floor."""
        return self.floor / median(self.samples[name]) if self.floor else None

    def to_dict(self) -> dict[str, Any]:
        """Every sample, and what the tables say of them."""
        compared = {name: self.ratio(name) for name in self.baselines} if OURS in self.samples else {}
        return {
            "what": self.what,
            "length": self.length,
            "shape": dict(self.shape),
            "parts": self.parts,
            "seconds_p50": {name: self.seconds(name) for name in self.samples},
            "seconds_p99": {name: self.tail(name) for name in self.samples},
            "times_faster_than": compared,
            "noise": self.noise,
            "floors": dict(self.floors),
            "share_of_floor": self.of_floor() if OURS in self.samples else None,
            "facts": dict(self.facts),
            "samples": {name: list(samples) for name, samples in self.samples.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Case":
        """The case that `to_dict` wrote."""
        samples = {name: tuple(seconds) for name, seconds in data["samples"].items()}
        kept = {name: data[name] for name in ("what", "length", "floors", "parts", "shape", "facts")}
        return cls(samples=samples, **kept)
