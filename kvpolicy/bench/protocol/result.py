"""What a benchmark measured, written to a file as it goes."""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

import attrs

from kvpolicy.bench.protocol.case import Case
from kvpolicy.bench.protocol.machine import environment
from kvpolicy.errors import InputError

FORM = 1  # of the file


@attrs.define
class Result:
    """Cases by part (`compress`, `decode`, `generate`), what was left out and why, and where the numbers come from."""

    name: str
    options: Mapping[str, Any]
    environment: Mapping[str, Any] = attrs.field(factory=environment)
    parts: dict[str, list[Case]] = attrs.field(factory=dict)
    left_out: list[dict[str, str]] = attrs.field(factory=list)
    facts: dict[str, Any] = attrs.field(factory=dict)  # of a part, or of the whole
    file: Path | None = None  # rewritten with every addition
    date: str = attrs.field(factory=lambda: datetime.now(UTC).date().isoformat())
    _started: float = attrs.field(factory=monotonic, repr=False)

    def add(self, part: str, case: Case) -> None:
        """One more case."""
        self.parts.setdefault(part, []).append(case)
        self.write()

    def collect(self, part: str, measured: Iterator[tuple[str, list[Case]]]) -> Iterator[str]:
        """Add cases as they are measured; yields what was done last."""
        for what, cases in measured:
            for case in cases:
                self.add(part, case)
            yield what

    def leave_out(self, what: str, why: str) -> None:
        """Say what is missing."""
        self.left_out.append({"what": what, "why": why})
        self.write()

    def note(self, name: str, fact: Any) -> None:
        """Something that is not a case."""
        self.facts[name] = fact
        self.write()

    def write(self) -> None:
        """Write the file atomically with all that has been added so far."""
        if self.file is not None:
            unfinished = self.file.with_suffix(".partial")
            unfinished.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            unfinished.replace(self.file)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every sample."""
        return {
            "form": FORM,
            "benchmark": self.name,
            "date": self.date,
            "seconds": round(monotonic() - self._started),
            **self.environment,
            "options": dict(self.options),
            "parts": {part: [case.to_dict() for case in cases] for part, cases in self.parts.items()},
            "left_out": self.left_out,
            "facts": self.facts,
        }


def read_result(file: Path) -> Result:
    """A result as it was written. Raises InputError."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("form") != FORM or "parts" not in data:
        raise InputError(f"{file}: is not a result of kvpolicy bench (form {FORM})")
    return Result(
        data["benchmark"],
        data["options"],
        {name: data[name] for name in ("versions", "machine")},
        {part: [Case.from_dict(case) for case in cases] for part, cases in data["parts"].items()},
        data["left_out"],
        data["facts"],
        date=data["date"],
    )
