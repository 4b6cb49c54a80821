"""Two pictures of an evaluation's record: answers against bytes, decode time against length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from kvpolicy.evaluate.plots import new_figure, save, style_of

TableData = Mapping[str, Any]
_RATIOS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16)
ACCURACY, TIME = "evaluation-accuracy.png", "evaluation-time.png"


def draw(record: TableData, folder: Path) -> None:
    """Write both pictures into a folder."""
    plot_accuracy(record, folder / ACCURACY)
    plot_time(record, folder / TIME)


def plot_accuracy(record: TableData, path: Path) -> None:
    """One panel a task and their mean; one line a policy, a point a share."""
    tasks, lines, names = list(record["setup"]["tasks"]), _by_policy(record["policies"]), _names(record)
    figure = new_figure(3.4 * (len(tasks) + 1), 5.2)
    panels = figure.subplots(1, len(tasks) + 1, sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, [*tasks, None], strict=True):
        for name, points in lines.items():
            held = [100 * one["held_share"] for one in points]
            right = [100 * _right(one, task) for one in points]
            panel.plot(held, right, label=name, markersize=5, **_style(name, names))
        panel.set(title=task or "mean of the tasks", xscale="log", ylim=(-4, 104))
        panel.set_xlabel("KV bytes held (% of the full cache's)")
        _tick(panel, record["setup"]["shares"])
    panels[0].set_ylabel("answer right before its first mistake (%)")
    read = ", ".join(f"{100 * share:.3g}" for share in record["setup"]["shares"])
    figure.suptitle(
        f"Answers against bytes held: testbed model, {record['setup']['items_per_task']} items a task\n"
        f"(policies with a reader hold everything, and read {read} % of it: points above each other)"
    )
    _legend(figure, panels[0])
    save(figure, path)


def plot_time(record: TableData, path: Path) -> None:
    """One line a policy: time of a step as a multiple of the full cache's."""
    lines, names = _by_policy(record["decode"]), _names(record)
    figure = new_figure(8.5, 6.2)
    panel = figure.subplots()
    panel.axhline(1, color="black", linewidth=0.8, linestyle="--", zorder=1)
    for name, points in lines.items():
        lengths, ratios = [one["length"] for one in points], [one["ratio"] for one in points]
        panel.plot(lengths, ratios, label=name, markersize=5, **_style(name, names))
    lengths = record["setup"]["decode"]["lengths"]
    panel.set(xscale="log", yscale="log", xlabel="tokens seen", ylabel="time of a decode step / full DynamicCache")
    panel.set_xticks(lengths, labels=[str(length) for length in lengths])
    low, high = panel.get_ylim()
    ratios = [ratio for ratio in _RATIOS if low <= ratio <= high]
    panel.set_yticks(ratios, labels=[f"{ratio:g}" for ratio in ratios])
    panel.minorticks_off()
    panel.grid(alpha=0.25)
    panel.set_title("Time of a decode step, compression included; lower is faster")
    _legend(figure, panel)
    save(figure, path)


def _by_policy(lines: Sequence[TableData]) -> dict[str, list[TableData]]:
    found: dict[str, list[TableData]] = {}
    for one in lines:
        if "refusal" not in one:
            found.setdefault(one["policy"], []).append(one)
    return found


def _names(record: TableData) -> list[str]:
    """Every policy once, so that it looks the same in both pictures."""
    return list(dict.fromkeys(one["policy"] for one in (*record["policies"], *record["decode"])))


def _right(one: TableData, task: str | None) -> float:
    shares = {name: found["share_before_first_mistake"] for name, found in one["tasks"].items()}
    return mean(shares.values()) if task is None else float(shares[task])


def _style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """More policies than colours: the line's kind tells those of one colour apart."""
    kinds = ("-", "--", ":", "-.")
    return {**style_of(name, names), "linestyle": kinds[names.index(name) // 8 % len(kinds)], "linewidth": 1.2}


def _tick(panel: Any, shares: Sequence[float]) -> None:
    ticks = sorted({100 * share for share in shares} | {50.0, 100.0})
    panel.set_xticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)
