"""A point in time after which nothing new is measured."""

import time
from collections.abc import Callable

import attrs


@attrs.frozen
class Deadline:
    """Seconds of a monotonic clock; `None` never comes."""

    at: float | None = None
    now: Callable[[], float] = time.monotonic

    @classmethod
    def within(cls, seconds: float, now: Callable[[], float] = time.monotonic) -> "Deadline":
        """That many seconds from now."""
        return cls(now() + seconds, now)

    @property
    def left(self) -> float:
        """Seconds that remain, not below 0; infinite when it never comes."""
        return float("inf") if self.at is None else max(0.0, self.at - self.now())

    def expired(self) -> bool:
        """Whether it has come."""
        return self.left <= 0

    def share(self, part: float) -> "Deadline":
        """A deadline after that part of what remains, and not later than this one."""
        return self if self.at is None else Deadline(self.now() + part * self.left, self.now)
