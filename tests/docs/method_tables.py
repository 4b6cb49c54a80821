"""Tables of what methods lose and cost, for the page of methods: every number is from the record of an evaluation."""

from collections.abc import Callable, Iterator, Sequence

import attrs

from kvpolicy.evaluate.harness.record import EvaluationRecord
from kvpolicy.evaluate.harness.setup import percent
from kvpolicy.evaluate.report.markdown import heading, row
from kvpolicy.evaluate.report.summary import Line, Summary, TaskSummary
from kvpolicy.evaluate.tasks.case import METRICS

_MISSING = "-"


@attrs.frozen
class Results:
    """What a record says of some of its tasks."""

    record: EvaluationRecord
    titles: dict[str, str]  # by task, what its numbers are called
    link: str  # of the record's page

    @property
    def tasks(self) -> tuple[TaskSummary, ...]:
        """Those of `titles` that have been measured, in that order."""
        found = {task.task: task for task in Summary(self.record).tasks if task.measured}
        return tuple(found[name] for name in self.titles if name in found)

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of a full cache's bytes, the largest first."""
        shares = {line.share for task in self.tasks for line in task.measured if line.share is not None}
        return tuple(sorted(shares, reverse=True))

    @property
    def setting(self) -> str:
        """Model and length of the texts, with a link to the record's page."""
        head = self.record.head
        length = head["sizes"]["length"]
        return f"[{head['model']['name']}]({self.link}), contexts of about {length} tokens"


def loss_by_task(results: Results, names: Sequence[str]) -> Iterator[str]:
    """For each task a table: a line a policy, a column a share; nothing for policies that were not measured."""
    for task in results.tasks:
        measured = _measured(task, names)
        if measured:
            yield f"**{results.titles[task.task]}**, {results.setting}\n"
            yield from _table(measured, results.shares, lambda line, task=task: _estimate(line, task))
            yield ""


def loss_by_share(results: Results, names: Sequence[str]) -> Iterator[str]:
    """One table of all tasks: a line a policy and share, a column a task."""
    by_task = {
        task.task: {(line.policy, line.share): line for line in _measured(task, names)} for task in results.tasks
    }
    if not any(by_task.values()):
        return
    yield f"**{', '.join(results.titles[name] for name in by_task)}**, {results.setting}\n"
    yield from heading("policy", "bytes", *(results.titles[name] for name in by_task))
    for name in names:
        linked = _linked(name)
        for share in (None, *results.shares):
            lines = [lines.get((name, share)) for lines in by_task.values()]
            if any(lines):
                cells = [_estimate(line, task) for line, task in zip(lines, results.tasks, strict=True)]
                yield row(linked, _held_by_all(lines) if share is None else percent(share), *cells)
                linked = ""
    yield ""


def bytes_and_times(results: Results, names: Sequence[str]) -> Iterator[str]:
    """A table of the first task: bytes held, and times of a prompt and of a decode step beside the full cache's."""
    task = next(iter(results.tasks), None)
    measured = [] if task is None else _measured(task, names)
    if task is None or not measured:
        return
    timed = bool(task.full is not None and task.full.costs) and any(line.costs for line in measured)
    shares = " / ".join(percent(share) for share in results.shares)
    yield f"**Bytes and time** at {shares}\n" if shares else "**Bytes and time**\n"
    yield from heading("policy", "held", *(("prompt", "decode step") if timed else ()))
    for name in names:
        lines = {line.share: line for line in measured if line.policy == name}
        if lines:
            times = [_listed(lines, results, _ratio(task.full, cost)) for cost in _TIMES] if timed else []
            yield row(_linked(name), _listed(lines, results, _held), *times)
    yield ""


_TIMES = ("prefill_seconds", "step_seconds")


def _measured(task: TaskSummary, names: Sequence[str]) -> list[Line]:
    return [line for line in task.measured if line.policy in names]


def _table(lines: Sequence[Line], shares: Sequence[float], cell: Callable[[Line], str]) -> Iterator[str]:
    """A line a policy, by name; one without a share of its own says in the first column what it holds."""
    whole = any(line.share is None for line in lines)
    shared = [share for share in shares if any(line.share == share for line in lines)]
    yield from heading("policy", *(("as it is",) if whole else ()), *map(percent, shared))
    for name in sorted({line.policy for line in lines}):
        own = {line.share: line for line in lines if line.policy == name}
        cells = [cell(own[share]) if share in own else "" for share in shared]
        if whole:
            line = own.get(None)
            cells.insert(0, "" if line is None else f"{cell(line)} at {_held(line)}")
        yield row(_linked(name), *cells)


def _estimate(line: Line | None, task: TaskSummary) -> str:
    """A mean with its interval, unless that is the mean."""
    if line is None:
        return ""
    found, metric = line.estimate(task.metric), METRICS[task.metric]
    mean, low, high = (
        f"{number:.0%}" if metric.percent else f"{number:.3g}" for number in (found.mean, found.low, found.high)
    )
    return mean if low == mean == high else f"{mean} [{low}, {high}]"


def _listed(lines: dict[float | None, Line], results: Results, cell: Callable[[Line], str]) -> str:
    """What a policy has at each share, or once where it has none."""
    shares = (None,) if None in lines else results.shares
    return " / ".join(cell(lines[share]) if share in lines else _MISSING for share in shares)


def _ratio(full: Line | None, cost: str) -> Callable[[Line], str]:
    def ratio(line: Line) -> str:
        if full is None or cost not in line.costs or cost not in full.costs:
            return _MISSING
        return f"{line.costs[cost] / full.costs[cost]:.2f}"

    return ratio


def _held(line: Line) -> str:
    return f"{100 * line.held_share:.3g}%"


def _held_by_all(lines: Sequence[Line | None]) -> str:
    held = [line.held_share for line in lines if line is not None]
    return f"holds {sum(held) / len(held):.0%}"


def _linked(name: str) -> str:
    """With a link to the policy, of which it may be a changed one."""
    policy, changed, _ = name.partition("+")
    return f"[{policy}](#{policy})" + (", on prompts" if changed else "")
