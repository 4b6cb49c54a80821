"""The picture of what each layer kept: layers by tokens, with the text under it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvpolicy.evaluate.report.plots import new_figure, save
from kvpolicy.evaluate.report.retention import Kept, Retention

_LINE = 44  # tokens side by side
_CELL, _LAYER, _TEXT, _FRAME = 0.33, 0.16, 0.85, 1.5  # inches
_MATTERS, _PLAIN = "#B00020", "#555555"


def plot_retention(kept: Kept, path: Path) -> None:
    """Blocks of lines of text; in each, one strip a policy, one row a layer; dark where all KV heads hold the token."""
    lines = list(_lines(len(kept.tokens)))
    layers = len(kept.by_policy[0].held)
    strips = len(kept.by_policy)
    height = len(lines) * (strips * (layers * _LAYER + 0.12) + _TEXT) + _FRAME
    figure = new_figure(_LINE * _CELL + 2.2, height)
    axes = figure.subplots(len(lines) * strips, 1, squeeze=False)[:, 0]
    image = None
    for block, (start, end) in enumerate(lines):
        for place, one in enumerate(kept.by_policy):
            panel = axes[block * strips + place]
            image = _strip(panel, one, start, end)
            if place == strips - 1:
                _write_tokens(panel, kept, start, end)
    bar = figure.colorbar(image, ax=list(axes), fraction=0.012, pad=0.01, ticks=[0, 0.5, 1])
    bar.set_label("share of KV heads that hold the token")
    figure.suptitle(_title(kept), fontsize=12)
    save(figure, path)


def _lines(tokens: int) -> Iterator[tuple[int, int]]:
    for start in range(0, tokens, _LINE):
        yield start, min(start + _LINE, tokens)


def _strip(panel: Any, one: Retention, start: int, end: int) -> Any:
    layers = len(one.held)
    extent = (start - 0.5, end - 0.5, layers - 0.5, -0.5)
    image = panel.imshow(
        one.held[:, start:end].numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="none"
    )
    panel.set_xlim(start - 0.5, start + _LINE - 0.5)
    panel.set_xticks([])
    panel.set_yticks([0, layers - 1], labels=["layer 0", f"{layers - 1}"], fontsize=7)
    panel.set_ylabel(one.policy.name, rotation=0, ha="right", va="center", labelpad=30, fontsize=10)
    panel.vlines([x - 0.5 for x in range(start, end)], -0.5, layers - 0.5, color="#DDDDDD", linewidth=0.4)
    panel.hlines([y - 0.5 for y in range(1, layers)], start - 0.5, end - 0.5, color="#DDDDDD", linewidth=0.4)
    for side in ("top", "right", "bottom", "left"):
        panel.spines[side].set_visible(False)
    return image


def _write_tokens(panel: Any, kept: Kept, start: int, end: int) -> None:
    panel.set_xticks(range(start, end), labels=kept.tokens[start:end], rotation=60, ha="right", rotation_mode="anchor")
    panel.tick_params(axis="x", length=0, pad=2, labelsize=9)
    for label, matters in zip(panel.get_xticklabels(), kept.matter[start:end], strict=True):
        label.set_color(_MATTERS if matters else _PLAIN)
        label.set_fontweight("bold" if matters else "normal")


def _title(kept: Kept) -> str:
    share = float(kept.by_policy[0].share)
    answers = ", ".join(f"{one.policy.name}: {'right' if one.right else 'wrong'}" for one in kept.by_policy)
    return (
        f"What each layer still holds in {share:.0%} of the full cache's bytes, after the answer was written\n"
        f"{kept.item.task}, {len(kept.tokens)} tokens; red: what the answer follows from. Answers, {answers}"
    )
