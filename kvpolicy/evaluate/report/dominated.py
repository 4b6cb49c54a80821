"""Policies than which another one is better wherever they were measured."""

from collections.abc import Collection, Mapping

from kvpolicy.evaluate.harness.record import EvaluationRecord
from kvpolicy.evaluate.report.summary import Line, Summary, TaskSummary
from kvpolicy.evaluate.tasks.case import METRICS


def dominated(record: EvaluationRecord, among: Collection[str] | None = None) -> Mapping[str, str]:
    """By policy, another one that is better: never worse in the mean, and told apart somewhere; with no more bytes.

    Looks at the policies `among` these, or at all of them.

    Compared are all tasks that the full cache does at all, a policy at a share with the other one at that share; one
    without a share with the other's line that holds most of those that hold no more. Of several the first by name.
    """
    tasks = [task for task in Summary(record).tasks if task.tells_something]
    measured = {line.policy for task in tasks for line in task.measured if not line.is_baseline}
    names = sorted(measured if among is None else measured & {*among})
    found = {}
    for name in names:
        better = next((other for other in names if other != name and _is_better(other, name, tasks)), None)
        if better is not None:
            found[name] = better
    return found


def _is_better(other: str, name: str, tasks: list[TaskSummary]) -> bool:
    apart = False
    for task in tasks:
        for line in (line for line in task.measured if line.policy == name):
            rival = _rival(line, [one for one in task.measured if one.policy == other])
            if rival is None:
                return False
            ours, theirs = line.estimate(task.metric).mean, rival.estimate(task.metric).mean
            if theirs != ours and (theirs > ours) != METRICS[task.metric].larger_is_better:
                return False
            apart = apart or (theirs != ours and rival.differs(line, task.metric))
    return apart


def _rival(line: Line, others: list[Line]) -> Line | None:
    """The line of another policy that is compared with a line."""
    if line.share is not None:
        others = [other for other in others if other.share == line.share]
    fitting = [other for other in others if other.holds_at_most(line.held_share)]
    return max(fitting, key=lambda other: other.held_share, default=None)
