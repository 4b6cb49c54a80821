"""What a policy did, for people (a table) and for programs (a dictionary)."""

from collections.abc import Sequence
from typing import Any

import attrs
from rich.console import Console
from rich.table import Table

from kvpolicy.plan.plan import Plan
from kvpolicy.plan.units import human_bytes
from kvpolicy.runtime.stats import LayerStats


@attrs.frozen
class Report:
    """One line per managed layer. `held` and `read` are in entries per KV head, averaged over rows and heads."""

    policy: str
    layers: tuple[LayerStats, ...]
    forwards_without_cache: int = 0  # of the attached model, that used another cache than the policy's

    @classmethod
    def of(cls, plan: Plan, stats: Sequence[LayerStats], forwards_without_cache: int = 0) -> "Report":
        """The state right now; later tokens do not change it."""
        return cls(plan.spec.name, tuple(attrs.evolve(one) for one in stats), forwards_without_cache)

    @property
    def nbytes(self) -> int:
        """Bytes of storage held by all managed layers."""
        return sum(layer.nbytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return {
            "policy": self.policy,
            "bytes_held": self.nbytes,
            "forwards_without_cache": self.forwards_without_cache,
            "layers": [attrs.asdict(layer) for layer in self.layers],
        }

    def table(self) -> Table:
        """The report as a rich table."""
        table = Table(title=f"policy {self.policy}: {human_bytes(self.nbytes)} held")
        if self.forwards_without_cache:
            table.caption = f"forwards without the policy's cache: {self.forwards_without_cache}"
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
                str(layer.seen),
                f"{layer.held:.1f}",
                f"{layer.read:.1f}" if layer.decode_steps else "",
                human_bytes(layer.nbytes),
                human_bytes(layer.peak_bytes),
                f"{layer.compressions}x",
                f"{layer.seconds * 1e3:.1f}",
            )
        return table

    def __str__(self) -> str:
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()
