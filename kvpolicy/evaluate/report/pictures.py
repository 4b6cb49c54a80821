"""The picture of an evaluation: quality against the bytes held, one panel a task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpolicy.evaluate.harness.record import EvaluationRecord
from kvpolicy.evaluate.report.plots import new_figure, save, style_of
from kvpolicy.evaluate.report.summary import Line, Summary, TaskSummary
from kvpolicy.evaluate.tasks.case import METRICS

_PANEL, _HEIGHT, _ROW = 3.6, 4.2, 0.22  # inches: a panel, all panels, a row of the legend
_LONGEST = 30  # letters of a name in the legend
_LETTERS, _KEY = 11, 9  # letters of an inch, and what the key of a legend takes, in letters
_KINDS = ("-", "--", ":", "-.")  # more policies than colours: the kind of line tells those of one colour apart


def plot_tradeoff(record: EvaluationRecord, path: Path) -> None:
    """One line a policy, a point a share, with its interval; the full cache as a dashed line."""
    summary = Summary(record)
    tasks = [task for task in summary.tasks if task.measured]
    names = list(dict.fromkeys(line.policy for task in tasks for line in task.measured if not line.is_baseline))
    labels = {name: name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in names}
    width = max(2, len(tasks)) * _PANEL
    columns = _columns(list(labels.values()), width)
    figure = new_figure(width, _HEIGHT + _ROW * -(-len(names) // columns))
    axes = figure.subplots(1, max(1, len(tasks)), squeeze=False)[0]
    for panel, task in zip(axes, tasks, strict=False):
        _draw(panel, task, names)
    handles: dict[str, Any] = {}
    for panel in axes:
        handles.update({label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)})
    order = [name for name in names if name in handles]
    figure.legend(
        [handles[name] for name in order],
        [labels[name] for name in order],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
    )
    model, sizes = record.head["model"], record.head["sizes"]
    figure.suptitle(f"{model['name']}, {model['dtype']}: prompts of about {sizes['length']} tokens", fontsize=12)
    save(figure, path)


def _columns(names: Sequence[str], width: float) -> int:
    """Columns of a legend that fit beside each other, all as wide as the longest name."""
    longest = max(map(len, names), default=1)
    return max(1, min(8, len(names), int(width * _LETTERS / (longest + _KEY))))


def _draw(panel: Any, task: TaskSummary, names: Sequence[str]) -> None:
    metric = METRICS[task.metric]
    factor = 100 if metric.percent else 1
    full = task.full
    if full is not None and metric.larger_is_better:
        panel.axhline(factor * full.estimate(task.metric).mean, color="black", linewidth=0.8, linestyle="--")
    for index, name in enumerate(names):
        points = sorted((line for line in task.measured if line.policy == name), key=lambda line: line.held_share)
        if points:
            _points(panel, points, task.metric, factor, name, {**style_of(name, names), "linestyle": _kind(index)})
    shares = sorted({100 * line.share for line in task.measured if line.share is not None})
    panel.set(title=task.task if task.tells_something else f"{task.task}\n(not done by the full cache)", xscale="log")
    lines = [line for line in task.measured if line.policy in names]
    if not metric.larger_is_better and any(line.estimate(task.metric).mean > 0 for line in lines):
        panel.set_yscale("log")
    panel.set_ylabel(f"{metric.name} (%)" if metric.percent else metric.name)
    panel.set_xlabel("bytes held (% of the full cache)")
    ticks = [*shares, 100.0]
    panel.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _points(panel: Any, lines: Sequence[Line], metric: str, factor: int, name: str, style: dict[str, Any]) -> None:
    found = [line.estimate(metric) for line in lines]
    means = [factor * one.mean for one in found]
    below = [max(0.0, factor * (one.mean - one.low)) for one in found]
    above = [max(0.0, factor * (one.high - one.mean)) for one in found]
    held = [100 * line.held_share for line in lines]
    panel.errorbar(
        held, means, yerr=[below, above], label=name, markersize=5, linewidth=1.2, elinewidth=0.6, capsize=2, **style
    )


def _kind(index: int) -> str:
    return _KINDS[index // 8 % len(_KINDS)]
