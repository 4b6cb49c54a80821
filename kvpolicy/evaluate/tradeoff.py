"""The picture of a comparison: how right answers are against the bytes held."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from kvpolicy.evaluate.compare import Outcome
from kvpolicy.evaluate.plots import new_figure, save, style_of
from kvpolicy.evaluate.setup import FULL, Setup
from kvpolicy.plan.explain.units import human_bytes

_PANEL, _HEIGHT = 3.1, 4.3
_APART = 1.03
_TITLE = (
    "Answers against KV bytes held by one sequence: testbed model, {items} items a task of {length} tokens, "
    "question {question} by the scorers\n(points of equal bytes are drawn a little apart)"
)
_SUMMARIES: dict[str, Callable[[list[float]], float]] = {"mean of the tasks": mean, "worst task": min}


def plot_tradeoff(setup: Setup, outcomes: Sequence[Outcome], path: Path) -> None:
    """One panel a task, then their mean and the worst of them; one line a policy, a point a budget."""
    panels = [*setup.tasks, *(_SUMMARIES if len(setup.tasks) > 1 else ())]
    figure = new_figure(max(2.4, len(panels)) * _PANEL, _HEIGHT)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    shares = sorted({100 * float(one.contender.share) for one in outcomes})
    for panel, title in zip(axes, panels, strict=True):
        _draw(panel, title, _points(outcomes, title), shares)
    axes[0].set_ylabel("answer right before its first mistake (%)")
    figure.suptitle(_TITLE.format(items=setup.items, length=setup.length, question=setup.question), fontsize=12)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(labels)), frameon=False)
    save(figure, path)


Points = dict[str, list[tuple[float, float, float]]]  # by policy: share held (%), right (%), bytes


def _points(outcomes: Sequence[Outcome], panel: str) -> Points:
    """The points of one panel; a summary takes the mean of the bytes and the mean or worst of the rest."""
    summary = _SUMMARIES.get(panel)
    chosen = [one for one in outcomes if summary is not None or one.task == panel]
    points: Points = {}
    for contender in dict.fromkeys(one.contender for one in chosen):
        same = [one for one in chosen if one.contender == contender]
        right = (summary or mean)([one.before_mistake for one in same])
        share, held = mean(one.held_share for one in same), mean(one.held_bytes for one in same)
        points.setdefault(contender.name, []).append((100 * share, 100 * right, held))
    return {name: sorted(line) for name, line in points.items()}


def _draw(panel: Any, title: str, points: Points, shares: Sequence[float]) -> None:
    names = [name for name in points if name != FULL]
    full_share, full_right, full_bytes = points[FULL][0]
    panel.axhline(full_right, color="black", linewidth=0.8, linestyle="--", zorder=1)
    for place, name in enumerate(names):
        aside = _APART ** (place - (len(names) - 1) / 2)  # points at equal bytes would hide each other
        held, right = [aside * one[0] for one in points[name]], [one[1] for one in points[name]]
        panel.plot(held, right, label=name, markersize=6, **style_of(name, names))
    panel.plot([full_share], [full_right], "k*", markersize=11, label=FULL, linestyle="none", zorder=3)
    panel.set(title=title, xscale="log", ylim=(-4, 104), xlim=(shares[0] / 1.3, 125))
    panel.set_xlabel(f"KV bytes held (% of {human_bytes(full_bytes)})")
    panel.set_xticks(shares, labels=[f"{share:g}" for share in shares])
    panel.minorticks_off()
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
