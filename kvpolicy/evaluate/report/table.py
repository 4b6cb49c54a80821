"""The table of an evaluation on a terminal: one line a contender, the main number of each task."""

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kvpolicy.evaluate.harness.record import EvaluationRecord
from kvpolicy.evaluate.report.summary import Line, Summary, TaskSummary
from kvpolicy.evaluate.tasks.case import METRICS

_CAPTION = """Bold: the best at its share, and those whose difference from it cannot be told from zero.
held: bytes of one sequence at the end, slack, observed queries and state included, mean over the tasks."""
_TIMES = """
step ms: median decode step of one row behind a prompt, on this machine while it did what else it did."""
_PEERS = """
Of peers (kvpress, transformers): bytes right after the prompt; the page says what is held in the end."""


def table_of(record: EvaluationRecord) -> Table:
    """The contenders in the order in which they ran."""
    summary, head = Summary(record), record.head
    title = (
        f"{escape(head['model']['name'])}, {head['model']['dtype']}, contexts of about {head['sizes']['length']} tokens"
    )
    timed = any(line.costs for task in summary.tasks for line in task.lines)
    caption = _CAPTION + (_TIMES if timed else "") + (_PEERS if any(task.has_peers for task in summary.tasks) else "")
    table = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("cache", no_wrap=True, overflow="ellipsis", max_width=32)
    table.add_column("held", justify="right", no_wrap=True)
    if timed:
        table.add_column("step ms", justify="right", no_wrap=True)
    for task in summary.tasks:
        name = METRICS[task.metric].name if task.metric != "correct" else ""
        doubt = "" if task.tells_something or task.full is None else " (not done by the full cache)"
        table.add_column(f"{task.task} {name}{doubt}".rstrip(), justify="right")
    best: dict[tuple[str, float | None], tuple[Line, ...]] = {
        (task.task, share): task.best(share) for task in summary.tasks for share in summary.shares
    }
    for share in (None, *summary.shares):
        if share is not None:
            table.add_section()
        for label, lines in _by_contender(summary, share).items():
            measured = [line for line in lines.values() if line.values]
            held = sum(line.held_share for line in measured) / max(1, len(measured))
            row = (_cell(task, lines.get(task.task), best.get((task.task, share), ())) for task in summary.tasks)
            steps = [line.costs["step_seconds"] for line in measured if line.costs]
            step = [f"{1000 * sum(steps) / len(steps):.0f}" if steps else ""] if timed else []
            table.add_row(escape(label), f"{held:.1%}" if measured else "", *step, *row)
    return table


def _by_contender(summary: Summary, share: float | None) -> dict[str, dict[str, Line]]:
    """Lines by contender and task."""
    found: dict[str, dict[str, Line]] = {}
    for task in summary.tasks:
        for line in task.lines:
            if line.share == share:
                found.setdefault(line.label, {})[task.task] = line
    return found


def _cell(task: TaskSummary, line: Line | None, best: tuple[Line, ...]) -> str:
    if line is None or not line.values:
        return "refused" if line is not None and line.refusal else ""
    metric, mean = METRICS[task.metric], line.estimate(task.metric).mean
    text = f"{mean:.0%}" if metric.percent else f"{mean:.3g}"
    return f"[bold]{text}[/bold]" if line in best else text
