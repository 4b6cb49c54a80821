"""Progress bars on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.markup import escape

from kvpolicy.cli.terminal.console import err

if TYPE_CHECKING:
    from rich.progress import Progress

    from kvpolicy.evaluate.harness.record import Cell


class BarWatcher:
    """Shows each part of a long run as a bar."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress

    def begin(self, what: str, steps: int) -> Callable[[str], None]:
        """A new bar."""
        bar = self._progress.add_task(escape(what), total=steps)
        return lambda text: self._progress.update(bar, advance=1, description=escape(text))


@contextmanager
def bars() -> Iterator[BarWatcher]:
    """A watcher whose bars are removed when the block ends."""
    from rich.progress import Progress, TimeElapsedColumn

    console, columns = err(), (*Progress.get_default_columns(), TimeElapsedColumn())
    # Where nobody watches, rich would write an empty line for bars that it does not show.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield BarWatcher(progress)


@contextmanager
def cells(total: int, add: "Callable[[Cell], None]") -> "Iterator[Callable[[Cell], None]]":
    """What to call for each cell that has been measured: `add`, and a bar with the time that is left moves on."""
    with bars() as watcher:
        done = watcher.begin("starting", total)

        def added(cell: "Cell") -> None:
            add(cell)
            done(f"{cell.task} {cell.policy}")

        yield added
