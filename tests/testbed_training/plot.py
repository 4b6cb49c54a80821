"""The picture of a training run: loss, and the share of right tokens per task, over the tokens seen."""

from itertools import pairwise
from pathlib import Path
from typing import Any

MILLION = 1e6


def plot_training(points: list[dict[str, Any]], path: Path) -> None:
    """Draw ``points`` (tokens, loss, accuracy per task, row length) to ``path``; needs ``kvpolicy[plots]``."""
    from matplotlib.figure import Figure  # noqa: PLC0415  an optional dependency

    figure = Figure(figsize=(9, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    tokens = [point["tokens"] / MILLION for point in points]
    upper.plot(tokens, [point["loss"] for point in points], color="black", linewidth=0.8)
    upper.set(ylabel="loss (weighted, nats)", yscale="log", title="Testbed model: training")
    for task in sorted({task for point in points for task in point["accuracy"]}):
        with_task = [point for point in points if task in point["accuracy"]]
        shares = [point["accuracy"][task] for point in with_task]
        lower.plot([point["tokens"] / MILLION for point in with_task], shares, linewidth=0.8, label=task)
    lower.set(ylabel="share of tokens right", xlabel="tokens seen (million)", ylim=(0, 1.01))
    lower.legend(loc="lower right")
    _mark_stages(points, (upper, lower))
    figure.savefig(path, dpi=110)


def _mark_stages(points: list[dict[str, Any]], panels: tuple[Any, ...]) -> None:
    for before, after in pairwise(points):
        if before["length"] != after["length"]:
            for panel in panels:
                panel.axvline(after["tokens"] / MILLION, color="grey", linewidth=0.6, linestyle=":")
