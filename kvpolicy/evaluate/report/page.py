"""The record of an evaluation as a page: every number in it is from the record."""

from collections.abc import Iterator, Sequence

from kvpolicy.errors import EvaluationError, one_line
from kvpolicy.evaluate.harness.record import EvaluationRecord
from kvpolicy.evaluate.harness.setup import OTHER_PRECISION, percent
from kvpolicy.evaluate.report.markdown import heading, row
from kvpolicy.evaluate.report.peers import about_peers, costs_beside_ours
from kvpolicy.evaluate.report.statistics import Estimate
from kvpolicy.evaluate.report.summary import Line, Summary, TaskSummary
from kvpolicy.evaluate.tasks.case import METRICS, Metric
from kvpolicy.evaluate.tasks.names import task_of

_SETTING = """Run on {date} with kvpolicy {kvpolicy}, torch {torch}, transformers {transformers}, Python {python}, on
{processor} with {threads} threads. Model: {name} ({parameters:,} parameters, {dtype}; weights {digest}). {documents}
documents a task of about {length} tokens; {minutes} minutes of measuring in all. Texts: {texts}.
"""
_HOW = """**held** is what the cache of one sequence takes at the end, entries, slack, observed queries and state, as a
share of a full cache's bytes in the same layers. Policies are scaled to their share by `kvpolicy.fit`; a reader (it
keeps everything) reads the share. Numbers are means over cases with 95 % bootstrap intervals. **Bold**: the best at
its share among those that hold no more, and every policy whose difference from it, case by case, has an interval that
contains zero: between those nothing is decided. `{floor}` shows how far rounding alone moves the numbers.
"""
_NAMED = 4  # of the best policies of a task and share, and of the texts
_NOTHING = "The full cache itself does not do this task: it says nothing about policies."


def page_of(record: EvaluationRecord, picture: str | None = None) -> str:
    """The whole page as Markdown."""
    return "\n".join(_page(record, picture)).rstrip() + "\n"


def _page(record: EvaluationRecord, picture: str | None) -> Iterator[str]:
    summary, head = Summary(record), record.head
    yield f"# Evaluation: {head['model']['name']}\n"
    sizes, texts = head["sizes"], _texts(sorted(head["texts"]))
    minutes = max(1, round(sum(cell.seconds for cell in record.cells) / 60))
    about = {**head["versions"], **head["machine"], **head["model"], **sizes}
    yield _SETTING.format(**about, date=head["date"], minutes=minutes, texts=texts)
    if picture is not None:
        yield f"![Quality against bytes held]({picture})\n"
    yield from _best(summary)
    yield _HOW.format(floor=OTHER_PRECISION)
    yield from about_peers(record)
    for task in summary.tasks:
        yield from _task(task, summary)


def _texts(names: Sequence[str]) -> str:
    """What the texts are called, the first of many; their digests are in the record."""
    if not names:
        return "generated"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _best(summary: Summary) -> Iterator[str]:
    """Which policies are best at each share, task by task."""
    tasks = [task for task in summary.tasks if task.tells_something]
    if not tasks:
        return
    yield "## Best at each share\n"
    yield from heading("of the bytes", *(task.task for task in tasks))
    for share in summary.shares:
        yield row(percent(share), *(_names(task, share) for task in tasks))
    yield ""


def _names(task: TaskSummary, share: float) -> str:
    best = task.best(share)
    if not best:
        return ""
    metric = METRICS[task.metric]
    names = [line.policy for line in best[:_NAMED]]
    more = f" and {len(best) - _NAMED} more" if len(best) > _NAMED else ""
    return f"{', '.join(names)}{more} ({_number(best[0].estimate(task.metric).mean, metric)})"


def _task(task: TaskSummary, summary: Summary) -> Iterator[str]:
    yield f"## {task.task}\n"
    about = _about(task.task)
    yield f"{about[:1].upper()}{about[1:]}. {task.cases} cases.\n"
    if task.full is not None and not task.tells_something:
        yield f"{_NOTHING}\n"
    if task.measured:
        yield from _measured(task, summary)
    for line in task.lines:
        if line.refusal:
            yield f"Not measured: {line.label}: {one_line(line.refusal)}\n"


def _measured(task: TaskSummary, summary: Summary) -> Iterator[str]:
    metrics = list(task.measured[0].values)
    yield "; ".join(f"**{name}**: {METRICS[name].help}" for name in metrics) + ".\n"
    yield from heading("cache", "held", *metrics)
    for share in (None, *summary.shares):
        best = task.best(share) if share is not None else ()
        for line in (line for line in task.measured if line.share == share):
            yield _cells(line, metrics, bold=task.metric if line in best else None)
    yield ""
    yield from costs_beside_ours(task)


def _about(name: str) -> str:
    """What a task asks; nothing for one that this version does not have."""
    try:
        return task_of(name).summary
    except EvaluationError:
        return ""


def _cells(line: Line, metrics: list[str], bold: str | None) -> str:
    numbers = []
    for name in metrics:
        text = _interval(line.estimate(name), METRICS[name])
        numbers.append(f"**{text}**" if name == bold else text)
    return row(line.label, f"{100 * line.held_share:.1f}%", *numbers)


def _interval(found: Estimate, metric: Metric) -> str:
    if found.low == found.high == found.mean:
        return _number(found.mean, metric)
    return f"{_number(found.mean, metric)} [{_number(found.low, metric)}, {_number(found.high, metric)}]"


def _number(value: float, metric: Metric) -> str:
    return f"{value:.0%}" if metric.percent else f"{value:.3g}"
