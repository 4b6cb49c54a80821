"""The record of an evaluation: JSON lines, one for where the numbers come from and one for each measured cell.

A cell is one contender on one group of cases of a task. Each is written when it is measured, so that a run that is
killed goes on where it stopped. Further policies, shares and tasks may be added to a record by a later run on the same
model, texts and sizes: its cells compare with those that are there.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import attrs

from kvpolicy.errors import InputError, one_line

FORM = 2  # of the record
_RUN, _CELL = "run", "cell"
_NEEDED = ("date", "versions", "machine", "model", "texts", "sizes")  # of a head, by whoever shows it
_NOT_COMPARED = ("date", "versions", "machine")  # a run may go on another day
_EXTENDED = ("policies", "shares", "tasks")  # a later run may bring more of them


def _listed(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(texts)


@attrs.frozen
class Cell:
    """What one contender gave on one group of cases."""

    task: str
    group: int
    policy: str
    share: float | None  # of the full cache's bytes; None where the policy has none
    values: Mapping[str, Sequence[float]] = attrs.field(factory=dict)  # by metric, one number a case
    digest: str | None = None  # of the fitted policy
    fitted: str | None = None  # that policy, as YAML
    held_bytes: float = 0.0  # of one sequence at the end, in managed layers: entries, slack, observed queries, state
    full_bytes: float = 0.0  # what a full cache of as many tokens takes there
    prompt_tokens: int = 0  # of the longest prompt
    seconds: float = 0.0
    texts: Sequence[str] = attrs.field(default=(), converter=_listed)  # the answers
    refusal: str = ""  # why there are no values
    peer: bool = False  # whether it is a cache of another library: what it holds is then that right after the prompt
    costs: Mapping[str, float] = attrs.field(factory=dict)  # where peers are measured: `Costs` by name
    versions: Mapping[str, str] = attrs.field(factory=dict)  # of the environment of a peer

    @property
    def key(self) -> tuple[str, int, str, float | None]:
        """What a cell is told apart by."""
        return self.task, self.group, self.policy, self.share


@attrs.frozen
class EvaluationRecord:
    """A head and cells."""

    head: Mapping[str, Any]
    cells: tuple[Cell, ...] = ()

    def of(self, task: str) -> tuple[Cell, ...]:
        """The cells of a task."""
        return tuple(cell for cell in self.cells if cell.task == task)


class RecordFile:
    """The file of a record that is being made. Raises InputError when it cannot be written."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        """Begin a new file, or go on with one that `head` goes with. Raises InputError for one of another run."""
        self.path = path
        self.record = EvaluationRecord(head)
        if path.exists() and not _is_part_of_a_head(_read(path)):
            found = read_record(path)
            self.record = attrs.evolve(found, head=_extended(path, found.head, head))
            self._drop_what_is_cut_off()
            if self.record.head != found.head:
                self._write_anew()
        else:
            self._drop_what_is_cut_off()
            self._write({"kind": _RUN, "form": FORM, **head})

    def add(self, cell: Cell) -> None:
        """Write a cell, so that it is there whatever happens next."""
        self._write({"kind": _CELL, **attrs.asdict(cell)})
        self.record = attrs.evolve(self.record, cells=(*self.record.cells, cell))

    def _write(self, line: Mapping[str, Any]) -> None:
        with _writing(self.path, "ab") as file:
            _put(file, [line])

    def _write_anew(self) -> None:
        """Write head and cells to a file beside it that then takes its place: a run that is killed loses nothing."""
        lines = [{"kind": _RUN, "form": FORM, **self.record.head}]
        lines += [{"kind": _CELL, **attrs.asdict(cell)} for cell in self.record.cells]
        beside = self.path.with_name(f"{self.path.name}.new")
        with _writing(beside, "wb") as file:
            _put(file, lines)
        try:
            beside.replace(self.path)
        except OSError as error:
            raise InputError(f"{one_line(self.path)}: cannot be written: {error.strerror}") from error

    def _drop_what_is_cut_off(self) -> None:
        """Remove a last line without its end: a run was killed while it was written."""
        data = _read(self.path) if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with _writing(self.path, "r+b") as file:
                file.truncate(whole)


def _put(file: IO[bytes], lines: Sequence[Mapping[str, Any]]) -> None:
    for line in lines:
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _writing(path: Path, mode: str) -> Iterator[IO[bytes]]:
    try:
        with path.open(mode) as file:
            yield file
    except OSError as error:
        raise InputError(f"{one_line(path)}: cannot be written: {error.strerror}") from error


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe may never end
            raise InputError(f"{one_line(path)}: is no regular file")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{one_line(path)}: cannot be read: {error.strerror}") from error


def _is_part_of_a_head(data: bytes) -> bool:
    """Whether a run was killed while it wrote its first line; an empty file is none of anybody."""
    start = json.dumps({"kind": _RUN, "form": FORM}).removesuffix("}").encode()
    return b"\n" not in data and (data.startswith(start) or start.startswith(data))


def read_record(path: Path) -> EvaluationRecord:
    """The record in a file; a last line that was cut off is left out. Raises InputError for anything else."""
    try:
        lines = list(_lines(_read(path)))
        head = _head(lines[0] if lines else {})
        cells = tuple(_cell(line) for line in lines[1:])
    except (ValueError, RecursionError, TypeError) as error:
        raise InputError(f"{one_line(path)}: is not a record of kvpolicy evaluate: {one_line(error)}") from error
    return EvaluationRecord(head, cells)


def _lines(data: bytes) -> Iterator[dict[str, Any]]:
    whole = data[: data.rfind(b"\n") + 1]
    for line in whole.splitlines():
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError("a line is no object")  # noqa: TRY004 - as the other faults of a file
        yield value


def _head(line: dict[str, Any]) -> dict[str, Any]:
    if line.pop("kind", None) != _RUN or line.pop("form", None) != FORM:
        raise ValueError(f"its form is not {FORM}")
    if missing := [name for name in _NEEDED if name not in line]:
        raise ValueError(f"its head lacks {', '.join(missing)}")
    return line


def _cell(line: dict[str, Any]) -> Cell:
    if line.pop("kind", None) != _CELL:
        raise ValueError("a line is no cell")
    cell = Cell(**line)
    numbers = cell.values.values() if isinstance(cell.values, dict) else [None]
    if not all(isinstance(one, list) and all(isinstance(number, int | float) for number in one) for one in numbers):
        raise ValueError("values of a cell are no numbers")
    costs = cell.costs.values() if isinstance(cell.costs, dict) else [None]
    if not all(isinstance(number, int | float) for number in costs):
        raise ValueError("costs of a cell are no numbers")
    if not isinstance(cell.versions, dict):
        raise ValueError("versions of a cell are no object")  # noqa: TRY004 - as the other faults of a file
    return cell


def _extended(path: Path, found: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Any]:
    """The head of a record that a run goes on with: its own, and the policies, shares and tasks that the run adds."""
    before, now = json.loads(json.dumps(found)), json.loads(json.dumps(head))
    other = [
        name
        for name in {**before, **now}
        if name not in (*_NOT_COMPARED, *_EXTENDED) and before.get(name) != now.get(name)
    ]
    policies, added = before.get("policies", {}), now.get("policies", {})
    if any(policies.get(name, digest) != digest for name, digest in added.items()):
        other.append("policies of the same name")
    if other:
        raise InputError(
            f"{one_line(path)}: is the record of another run ({', '.join(sorted(other))} differ); "
            "give another place, or the settings of that run to go on with it"
        )
    lists = {name: list(dict.fromkeys([*before.get(name, []), *now.get(name, [])])) for name in ("shares", "tasks")}
    extended = {"policies": {**policies, **added}, **lists}
    return {**found, **{name: value for name, value in extended.items() if value}}
