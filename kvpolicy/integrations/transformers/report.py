"""Reports of a policy's effect, as a table and as a dictionary."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import attrs
from rich.console import Console
from rich.table import Table

from kvpolicy.cache.stats import LayerStats
from kvpolicy.plan.explain.units import human_bytes
from kvpolicy.plan.plan import Plan

_NAMES = {
    "entries": "entries of the layers above",
    "window": "queries observed for scorers and mergers",
    "state": "state of plugins",
    "other_layers": "layers that the policy does not manage",
    "static": "static decode steps",
}


@attrs.frozen
class Report:
    """Statistics per managed layer. `held` and `read` are entries per KV head, averaged over rows and heads."""

    policy: str
    layers: tuple[LayerStats, ...]
    stock_bytes: int = 0  # of layers that the policy does not manage: those with a sliding window
    static_bytes: int = 0  # of static decode steps, besides the entries in their storage
    forwards_without_cache: int = 0  # of the attached model, with another cache than the policy's
    full_bytes: int = 0  # of a cache without a policy after as many tokens, in all layers and rows

    @classmethod
    def of(
        cls,
        plan: Plan,
        stats: Sequence[LayerStats],
        *,
        stock_bytes: int = 0,
        static_bytes: int = 0,
        forwards_without_cache: int = 0,
    ) -> "Report":
        """A report of the current state; later tokens do not change it."""
        layers = tuple(layer_stats.in_plain_numbers() for layer_stats in stats)
        return cls(plan.spec.name, layers, stock_bytes, static_bytes, forwards_without_cache, _full_bytes(plan, layers))

    @property
    def nbytes(self) -> int:
        """Total bytes of the cache, for all rows: the sum of `parts`."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by purpose: entries, observation window, state, layers that are not managed, static steps."""
        return {
            "entries": sum(layer.entry_bytes for layer in self.layers),
            "window": sum(layer.window_bytes for layer in self.layers),
            "state": sum(layer.state_bytes for layer in self.layers),
            "other_layers": self.stock_bytes,
            "static": self.static_bytes,
        }

    @property
    def share(self) -> float | None:
        """`nbytes` as a share of `full_bytes`; None before there are tokens."""
        return self.nbytes / self.full_bytes if self.full_bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return {
            "policy": self.policy,
            "bytes_held": self.nbytes,
            "full_bytes": self.full_bytes,
            "share_of_full": self.share,
            "bytes": self.parts,
            "forwards_without_cache": self.forwards_without_cache,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def table(self) -> Table:
        """The report as a rich table of at most 80 columns: neighbours that are alike share a line, sums come last."""
        share = "" if self.share is None else f", {self.share:.1%} of a full cache"
        table = Table(title=f"policy {self.policy}: {human_bytes(self.nbytes)} held{share}")
        for heading in ("layers", "tokens", "held", "read", "bytes", "peak", "times", "ms"):
            table.add_column(heading, justify="right")
        groups = list(_alike(self.layers))
        for group in groups:
            table.add_row(_named(group), *_common(group[0]), *_sums(group), f"{group[0].compressions}x", _time(group))
        if len(groups) > 1:
            table.add_section()
            table.add_row("all", "", "", "", *_sums(self.layers), "", _time(self.layers))
        named = {name: count for name, count in self.parts.items() if count or name == "entries"}
        lines = ["held, read: entries per KV head, now and in a step", "times: compressions of a layer", ""]
        lines += [f"{_NAMES[name]}: {human_bytes(count)}" for name, count in named.items()]
        if self.full_bytes:
            lines.append(f"a full cache of as many tokens: {human_bytes(self.full_bytes)}")
        if self.forwards_without_cache:
            lines.append(f"forwards without the policy's cache: {self.forwards_without_cache}")
        table.caption = "\n".join(lines)
        return table

    def __str__(self) -> str:
        console = Console(width=80, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _full_bytes(plan: Plan, layers: Sequence[LayerStats]) -> int:
    if not layers:
        return 0
    footprint, first = plan.footprint, layers[0]  # every layer has seen the same tokens
    return first.rows * (footprint.full_bytes(first.seq_len) + footprint.stock_bytes(first.seq_len))


def _alike(layers: Sequence[LayerStats]) -> Iterator[list[LayerStats]]:
    """Neighbours that a table would tell the same of, but for the time that they took."""
    for _, group in groupby(
        layers, key=lambda layer: (*_common(layer), layer.nbytes, layer.peak_bytes, layer.compressions)
    ):
        yield list(group)


def _named(group: Sequence[LayerStats]) -> str:
    """The indices within the model: "3", "0-29", or with gaps "5-17 (3)"."""
    first, last = group[0].layer, group[-1].layer
    if len(group) == 1:
        return str(first)
    gaps = last - first + 1 != len(group)
    return f"{first}-{last} ({len(group)})" if gaps else f"{first}-{last}"


def _common(layer: LayerStats) -> tuple[str, str, str]:
    """Tokens, entries held, entries read."""
    return str(layer.seq_len), f"{layer.held:.1f}", f"{layer.read:.1f}" if layer.decode_steps else ""


def _sums(group: Sequence[LayerStats]) -> tuple[str, str]:
    """Bytes and peak bytes of all layers of a group together."""
    return human_bytes(sum(layer.nbytes for layer in group)), human_bytes(sum(layer.peak_bytes for layer in group))


def _time(group: Sequence[LayerStats]) -> str:
    """Milliseconds of all layers of a group together."""
    spent = sum(layer.seconds for layer in group) * 1e3
    return f"{spent:.1f}" if spent < 1000 else f"{spent:.0f}"
