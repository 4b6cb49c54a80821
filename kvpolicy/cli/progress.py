"""Progress bars on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvpolicy.cli.console import err

if TYPE_CHECKING:
    from rich.progress import Progress


class BarWatcher:
    """Shows each part of a long run as a bar."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress

    def begin(self, what: str, steps: int) -> Callable[[str], None]:
        """A new bar."""
        bar = self._progress.add_task(what, total=steps)
        return lambda text: self._progress.update(bar, advance=1, description=text)


@contextmanager
def bars() -> Iterator[BarWatcher]:
    """A watcher whose bars are removed when the block ends."""
    from rich.progress import Progress, TimeElapsedColumn

    console, columns = err(), (*Progress.get_default_columns(), TimeElapsedColumn())
    # Where nobody watches, rich would write an empty line for bars that it does not show.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield BarWatcher(progress)
