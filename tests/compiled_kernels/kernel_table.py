"""What was compiled as plain data, and what has changed since it was last written down."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from kvpolicy.errors import InputError
from tests.compiled_kernels.target import Compiled, compiler_version

FORM = 1
KernelTable = Mapping[str, Any]  # form, versions, and a mapping for each compiled build


def table_of(compiled: Iterable[Compiled]) -> dict[str, Any]:
    """Everything as JSON-ready data."""
    rows = [attrs.asdict(build) for build in compiled]
    return {"form": FORM, "versions": {"triton": compiler_version()}, "compiled": rows}


def read_table(file: Path) -> dict[str, Any]:
    """Raises InputError when the file is not a record of compiled kernels."""
    try:
        table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(table, dict) or table.get("form") != FORM:
        raise InputError(f"{file}: is not a record of compiled kernels (form {FORM})")
    return table


def differences(table: KernelTable, recorded: KernelTable) -> list[str]:
    """Where two tables made with one version of Triton differ; empty for tables of different versions."""
    if table["versions"] != recorded["versions"]:
        return []
    now, then = _by_target(table["compiled"]), _by_target(recorded["compiled"])
    lost = [f"{target}: is recorded, but was not compiled" for target in then if target not in now]
    new = [f"{target}: is not recorded" for target in now if target not in then]
    changed = [
        f"{target}: {key} was {then[target].get(key)}, is {value}"
        for target in now
        if target in then
        for key, value in now[target].items()
        if value != then[target].get(key)
    ]
    return [*lost, *new, *changed]


def _by_target(compiled: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {f"{row['name']}, sm_{row['capability']}": row for row in compiled}
