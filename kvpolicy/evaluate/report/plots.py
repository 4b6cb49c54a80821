"""Shared by all pictures: whether matplotlib is installed, colours, saving."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MISSING = "matplotlib is not installed, so no pictures are drawn: pip install 'kvpolicy[plots]'"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#666666")
_MARKERS = "os^DvPX*"
DPI = 110


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that many inches, which belongs to no window."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional dependency

    return Figure(figsize=(width, height), layout="constrained")


def style_of(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour (told apart by the colour-blind too) and marker of one policy among `names`."""
    index = names.index(name)
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}


def save(figure: Any, path: Path) -> None:
    """Write the figure as PNG."""
    figure.savefig(path, dpi=DPI, facecolor="white")
