"""The cells of a record, brought together: one line a contender and task."""

from collections import Counter
from collections.abc import Mapping
from functools import cached_property

import attrs

from kvpolicy.evaluate.harness.record import Cell, EvaluationRecord
from kvpolicy.evaluate.harness.setup import FULL, OTHER_PRECISION, percent
from kvpolicy.evaluate.report.statistics import Estimate, differ, estimate
from kvpolicy.evaluate.tasks.case import METRICS
from kvpolicy.evaluate.tasks.names import TASKS

MAIN = ("correct", "kl")  # the metrics that lines are compared by, of which a task has one
_ROUNDING = 1.02  # held bytes above a share that bookkeeping may take
_DONE_AT_ALL = 0.5  # of the answers right with the full cache


@attrs.frozen
class Line:
    """A contender on all groups of a task."""

    task: str
    policy: str
    share: float | None
    values: Mapping[str, tuple[float, ...]]  # by metric, one number a case
    held_share: float  # bytes held at the end as a share of the full cache's, mean over the groups
    seconds: float
    groups: tuple[int, ...]  # those that were measured
    refusal: str = ""
    peer: bool = False  # whether it is a cache of another library, held right after the prompt
    costs: Mapping[str, float] = attrs.field(factory=dict)  # by name, means over the groups; where peers are measured

    @property
    def label(self) -> str:
        """`"rkv 10%"`."""
        return self.policy if self.share is None else f"{self.policy} {percent(self.share)}"

    @property
    def is_baseline(self) -> bool:
        """Whether it is the full cache, in one precision or the other."""
        return self.policy in (FULL, OTHER_PRECISION)

    def estimate(self, metric: str) -> Estimate:
        """Mean and interval of a metric."""
        return estimate(self.values[metric])

    def holds_at_most(self, share: float) -> bool:
        """Whether it holds no more than a share of the full cache's bytes, up to what bookkeeping takes."""
        return self.held_share <= _ROUNDING * share

    def differs(self, other: "Line", metric: str) -> bool:
        """Whether it can be told apart from another line; always, if they were not measured on the same cases."""
        return self.groups != other.groups or differ(self.values[metric], other.values[metric])


@attrs.frozen
class TaskSummary:
    """All lines of a task, as far as they have been measured."""

    task: str
    metric: str  # the one that lines are compared by
    lines: tuple[Line, ...]

    @property
    def measured(self) -> tuple[Line, ...]:
        """Lines with values."""
        return tuple(line for line in self.lines if line.values)

    @property
    def cases(self) -> int:
        """Cases of the full cache's line, 0 if it was not measured."""
        return max((len(line.values[self.metric]) for line in self.measured), default=0)

    @property
    def full(self) -> Line | None:
        """The line of the full cache."""
        return next((line for line in self.measured if line.policy == FULL), None)

    @property
    def has_peers(self) -> bool:
        """Whether caches of other libraries are among the lines."""
        return any(line.peer for line in self.lines)

    @property
    def tells_something(self) -> bool:
        """Whether the full cache does the task at all; otherwise no policy can be judged by it."""
        full = self.full
        return self.metric != "correct" or (full is not None and full.estimate("correct").mean >= _DONE_AT_ALL)

    def best(self, share: float | None) -> tuple[Line, ...]:
        """The line with the best mean at a share, and those that cannot be told apart from it; the best one first.

        Policies that hold more than their share, such as readers, which only read less, are not among them.
        """
        alike = [line for line in self.measured if line.share == share and not line.is_baseline]
        lines = _on_the_same_groups([line for line in alike if share is None or line.holds_at_most(share)])
        if not lines:
            return ()
        lines.sort(key=lambda line: line.estimate(self.metric).mean, reverse=METRICS[self.metric].larger_is_better)
        return (lines[0], *(line for line in lines[1:] if not line.differs(lines[0], self.metric)))


@attrs.frozen(eq=False)
class Summary:
    """A record by task."""

    record: EvaluationRecord

    @cached_property
    def tasks(self) -> tuple[TaskSummary, ...]:
        """In the order in which they were run."""
        names = dict.fromkeys(cell.task for cell in self.record.cells)
        return tuple(_task(name, self.record.of(name)) for name in names)

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of policies, the largest first."""
        return tuple(sorted({cell.share for cell in self.record.cells if cell.share is not None}, reverse=True))


def _task(name: str, cells: tuple[Cell, ...]) -> TaskSummary:
    metrics = {metric for cell in cells for metric in cell.values}
    if not metrics and name in TASKS:
        metrics = set(TASKS[name].metrics)  # nothing was measured, and the lines say why
    metric = next((metric for metric in MAIN if metric in metrics), MAIN[0])
    keys = dict.fromkeys((cell.policy, cell.share) for cell in cells)
    lines = tuple(_line(name, *key, [cell for cell in cells if (cell.policy, cell.share) == key]) for key in keys)
    return TaskSummary(name, metric, lines)


def _line(task: str, policy: str, share: float | None, cells: list[Cell]) -> Line:
    measured = sorted((cell for cell in cells if cell.values), key=lambda cell: cell.group)
    metrics = measured[0].values if measured else {}
    return Line(
        task=task,
        policy=policy,
        share=share,
        values={name: tuple(value for cell in measured for value in cell.values[name]) for name in metrics},
        held_share=sum(cell.held_bytes / max(1, cell.full_bytes) for cell in measured) / max(1, len(measured)),
        seconds=sum(cell.seconds for cell in measured),
        groups=tuple(cell.group for cell in measured),
        refusal=next((cell.refusal for cell in cells if cell.refusal), ""),
        peer=any(cell.peer for cell in cells),
        costs=_mean_costs(measured),
    )


def _mean_costs(cells: list[Cell]) -> dict[str, float]:
    """Means over the cells that were timed."""
    timed = [cell.costs for cell in cells if cell.costs]
    names = [name for name in timed[0] if all(name in costs for costs in timed)] if timed else []
    return {name: sum(costs[name] for costs in timed) / len(timed) for name in names}


def _on_the_same_groups(lines: list[Line]) -> list[Line]:
    """The lines that were measured on the groups that most of them were measured on; others are not ranked."""
    counts = Counter(line.groups for line in lines)
    most = max(counts, key=lambda groups: (counts[groups], len(groups)), default=())
    return [line for line in lines if line.groups == most]
