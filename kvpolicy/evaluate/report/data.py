"""The summary of an evaluation as plain data, for programs."""

from typing import Any

import attrs

from kvpolicy.evaluate.harness.record import EvaluationRecord
from kvpolicy.evaluate.report.summary import Line, Summary


def summary_data(record: EvaluationRecord) -> dict[str, Any]:
    """Head and lines as JSON-ready data; by task, every metric with its interval, and which lines are best."""
    summary = Summary(record)
    return {
        **record.head,
        "tasks": {
            task.task: {
                "cases": task.cases,
                "metric": task.metric,
                "done_by_the_full_cache": task.tells_something,
                "lines": [_line(line) for line in task.lines],
                "best": {str(share): [line.policy for line in task.best(share)] for share in summary.shares},
            }
            for task in summary.tasks
        },
    }


def _line(line: Line) -> dict[str, Any]:
    about: dict[str, Any] = {"policy": line.policy, "share": line.share, **({"peer": True} if line.peer else {})}
    if not line.values:
        return {**about, "refusal": line.refusal}
    estimates = {name: attrs.asdict(line.estimate(name)) for name in line.values}
    costs = {"costs": dict(line.costs)} if line.costs else {}
    return {**about, "held_share": line.held_share, "seconds": line.seconds, **costs, **estimates}
