"""The training's progress on the terminal: time, loss, and the share of right tokens per task."""

from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.testbed_training.checkpoint import Run


class Display:
    """A progress bar over ``seconds`` of training; on a plain stream it prints one line a point instead."""

    def __init__(self, seconds: float) -> None:
        """Prepare the bar; it appears on entering the context."""
        columns = (BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[state]}"))
        self._progress = Progress(*columns)
        self._task = self._progress.add_task("training", total=seconds, state="")

    def __enter__(self) -> Self:
        """Show the bar."""
        if self._progress.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it last was."""
        self._progress.stop()

    def show(self, run: Run, point: dict[str, Any]) -> None:
        """Move the bar to the run's time and print the point's loss and accuracies."""
        shares = "  ".join(f"{task} {share:.1%}" for task, share in point["accuracy"].items())
        speed = run.tokens / max(run.seconds, 1e-9)
        state = f"step {run.step}  length {point['length']}  loss {point['loss']:.3f}  {shares}  {speed:.0f} tokens/s"
        self._progress.update(self._task, completed=run.seconds, state=state)
        if not self._progress.console.is_terminal:
            self._progress.console.print(f"{run.seconds:7.0f}s  {state}", soft_wrap=True)
