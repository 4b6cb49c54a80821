"""How many times faster ours is, against the context length, with the floor drawn in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpolicy.bench.protocol.case import OURS, Case
from kvpolicy.bench.protocol.result import Result
from kvpolicy.evaluate.report.plots import new_figure, save, style_of

_WIDTH, _HEIGHT = 4.6, 4.2


def draw(result: Result, path: Path) -> bool:
    """One panel for each part and baseline; False, and nothing written, when nothing can be compared."""
    panels = _panels(result)
    if not panels:
        return False
    figure = new_figure(_WIDTH * len(panels), _HEIGHT + 0.8)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    names = sorted({case.what for _, _, cases in panels for case in cases})
    for axis, (part, baseline, cases) in zip(axes, panels, strict=True):
        for name in names:
            _line(axis, baseline, [case for case in cases if case.what == name], style_of(name, names))
        axis.axhline(1.0, color="#999999", linewidth=0.8)
        axis.set(title=f"{part}: {baseline}", xscale="log", yscale="log", xlabel="tokens of context")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("time as a multiple of ours; dashed: of the floor")
    _legend(figure, axes)
    save(figure, path)
    return True


def _panels(result: Result) -> list[tuple[str, str, list[Case]]]:
    panels = []
    for part, cases in result.parts.items():
        compared = [case for case in cases if OURS in case.samples and case.length]  # the axis is logarithmic
        baselines = dict.fromkeys(name for case in compared for name in case.baselines)
        panels += [(part, name, [case for case in compared if name in case.samples]) for name in baselines]
    return panels


def _line(axis: Any, baseline: str, cases: Sequence[Case], style: dict[str, Any]) -> None:
    if not cases:
        return
    ranked = sorted(cases, key=lambda case: case.length)
    lengths = [case.length for case in ranked]
    axis.plot(lengths, [case.ratio(baseline) for case in ranked], label=ranked[0].what, markersize=5, **style)
    floors = [(case.length, case.seconds(baseline) * case.parts / case.floor) for case in ranked if case.floor]
    if floors:
        axis.plot(*zip(*floors, strict=True), linestyle="--", linewidth=0.9, color=style["color"])


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    labelled: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        labelled.update(zip(labels, handles, strict=True))
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=6, frameon=False)
