"""One run of a benchmark: its clock, its deadline, its bar, and the result that it leaves behind."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from kvpolicy.cli.bench.output import finish
from kvpolicy.cli.terminal.files import make_folder

if TYPE_CHECKING:
    import torch

    from kvpolicy.bench.protocol.case import Case
    from kvpolicy.bench.protocol.clock import Clock
    from kvpolicy.bench.protocol.deadline import Deadline
    from kvpolicy.bench.protocol.result import Result


@attrs.frozen
class Session:
    """Clock, deadline, result and progress of a running benchmark."""

    clock: "Clock"
    deadline: "Deadline"
    result: "Result"
    done: Callable[[str], None]  # moves the bar by one step

    def collect(self, part: str, measured: "Iterator[tuple[str, list[Case]]]") -> None:
        """Add cases to the result as they are measured."""
        for what in self.result.collect(part, measured):
            self.done(what)


@contextmanager
def session(
    name: str,
    options: dict[str, Any],
    folder: Path,
    device: "torch.device",
    steps: int,
    *,
    threads: int | None = None,
    seconds: float | None = None,
    file: str = "",
) -> Iterator[Session]:
    """A run whose result is kept in a file of the folder; when it is over the tables are printed and written.

    Raises InputError for a folder that cannot be made, and for numbers that are not above 0.
    """
    import torch

    from kvpolicy.bench.protocol.clock import clock_for
    from kvpolicy.bench.protocol.deadline import Deadline
    from kvpolicy.bench.protocol.result import Result
    from kvpolicy.cli.terminal.progress import bars
    from kvpolicy.errors import InputError

    if (threads is not None and threads < 1) or (seconds is not None and seconds <= 0):
        raise InputError("--threads and --seconds must be above 0")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with bars() as watcher:
            deadline = Deadline() if seconds is None else Deadline.within(seconds)
            make_folder(folder, "--out ")
            result = Result(name, options, file=folder / f"{file or name}.json")
            result.write()
            yield Session(clock_for(device), deadline, result, watcher.begin(name, steps))
    finally:
        torch.set_num_threads(before)
    finish(result)
