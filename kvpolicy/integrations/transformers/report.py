"""Reports of a policy's effect, as a table and as a dictionary."""

from collections.abc import Sequence
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
        layers = tuple(attrs.evolve(layer_stats) for layer_stats in stats)
        return cls(plan.spec.name, layers, stock_bytes, static_bytes, forwards_without_cache)

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

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return {
            "policy": self.policy,
            "bytes_held": self.nbytes,
            "bytes": self.parts,
            "forwards_without_cache": self.forwards_without_cache,
            "layers": [{**attrs.asdict(layer), "nbytes": layer.nbytes} for layer in self.layers],
        }

    def table(self) -> Table:
        """The report as a rich table."""
        table = Table(title=f"policy {self.policy}: {human_bytes(self.nbytes)} held")
        for heading in (
            "layer",
            "tokens seen",
            "entries held",
            "read a step",
            "bytes held",
            "peak bytes",
            "compressed",
            "ms",
        ):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            table.add_row(
                str(layer.layer),
                str(layer.seq_len),
                f"{layer.held:.1f}",
                f"{layer.read:.1f}" if layer.decode_steps else "",
                human_bytes(layer.nbytes),
                human_bytes(layer.peak_bytes),
                f"{layer.compressions}x",
                f"{layer.seconds * 1e3:.1f}",
            )
        named = {name: count for name, count in self.parts.items() if count or name == "entries"}
        lines = [f"{_NAMES[name]}: {human_bytes(count)}" for name, count in named.items()]
        if self.forwards_without_cache:
            lines.append(f"forwards without the policy's cache: {self.forwards_without_cache}")
        table.caption = "\n".join(lines)
        return table

    def __str__(self) -> str:
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()
