"""What was compiled as plain data, and what has changed since it was last recorded."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from kvpolicy.bench.compiled.target import Compiled, compiler_version
from kvpolicy.errors import InputError

FORM = 1
Record = Mapping[str, Any]


def record_of(compiled: Iterable[Compiled]) -> dict[str, Any]:
    """Everything as JSON-ready data."""
    return {
        "form": FORM,
        "versions": {"triton": compiler_version()},
        "compiled": [attrs.asdict(one) for one in compiled],
    }


def read_record(file: Path) -> dict[str, Any]:
    """Raises InputError when the file is not a record of compiled kernels."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("form") != FORM:
        raise InputError(f"{file}: is not a record of compiled kernels (form {FORM})")
    return found


def differences(found: Record, recorded: Record) -> list[str]:
    """Where two records made with one version of Triton differ; empty for records of different versions."""
    if found["versions"] != recorded["versions"]:
        return []
    now, then = _by_place(found["compiled"]), _by_place(recorded["compiled"])
    lost = [f"{place}: is recorded, but was not compiled" for place in then if place not in now]
    new = [f"{place}: is not recorded" for place in now if place not in then]
    return [*lost, *new, *(text for place in now if place in then for text in _changes(place, now[place], then[place]))]


def _by_place(compiled: Sequence[Record]) -> dict[str, Record]:
    return {f"{one['name']}, sm_{one['capability']}": one for one in compiled}


def _changes(place: str, now: Record, then: Record) -> list[str]:
    keys = [key for key in now if now[key] != then.get(key)]
    return [f"{place}: {key} was {then.get(key)}, is {now[key]}" for key in keys]
