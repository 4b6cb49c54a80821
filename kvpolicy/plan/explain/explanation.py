"""What a plan will do and cost, before anything runs: budgets, bytes held, bytes moved."""

from typing import Any

import attrs
from rich.console import Console, Group
from rich.text import Text

from kvpolicy.errors import InputError
from kvpolicy.plan.explain.compression_steps import steps_of
from kvpolicy.plan.explain.devices import Device
from kvpolicy.plan.explain.steps import Shapes, Step
from kvpolicy.plan.explain.tables import budgets_table, memory_table, steps_table
from kvpolicy.plan.plan import Plan
from kvpolicy.spec.dump import digest
from kvpolicy.stages import Geometry

LENGTH = 8192
_ALL_GENERATED = "all of them generated: a prompt is held whole, and its tokens do not count for the budget"


@attrs.frozen
class LayerShare:
    """What one managed layer may hold, in entries per KV head and sequence."""

    layer: int  # index within the model
    budget: int
    capacity: int  # slots: the budget, and what may come on top of it before the next compression


@attrs.frozen
class Explanation:
    """A plan in numbers, for one sequence of `length` tokens."""

    policy: str
    digest: str
    geometry: Geometry
    device: str
    dtype: str
    length: int  # tokens seen
    evicts: bool  # whether anything is evicted up to that length
    layers: tuple[LayerShare, ...]
    protected: tuple[int, int]  # sinks and recent entries of each head
    competing: bool  # whether layers compete: each then gets more or less than its budget, which is an average
    at_most: bool  # whether a compression may leave less than the budget, by what entries score
    whole_prompt: bool  # whether all layers hold all of a prompt before any of them is compressed
    raised: str  # why more is held than a share of the tokens says; empty when it is not
    assumed: str  # what of the sequence the budget depends on, beside its length; empty when on nothing
    columns: dict[str, float]  # bytes that one more entry of one KV head takes, averaged over layers, by column
    unfused: str  # why no kernels run at all; empty when they do
    rates: Device | None  # of the device that floors are for
    steps: tuple[Step, ...]  # of one compression of one layer
    held_bytes: int  # entries of all managed layers, at capacity
    window_bytes: int  # queries that the observation windows of all layers hold
    state_bytes: int  # what managed layers carry beside both
    stock_bytes: int  # layers that the policy does not manage: those with a sliding window
    full_bytes: int  # what the cache of the model without a policy holds after as many tokens, in all layers

    @property
    def entry_bytes(self) -> float:
        """Bytes of one more entry of one KV head, all columns, once a sequence is long."""
        return sum(self.columns.values())

    @property
    def total_bytes(self) -> int:
        """All that is held: entries, queries, state, and the layers that are not managed."""
        return self.held_bytes + self.window_bytes + self.state_bytes + self.stock_bytes

    @property
    def moved_bytes(self) -> int:
        """Bytes that one compression of one layer reads and writes."""
        return sum(step.read + step.written for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        rates = self.rates
        floors = [None if rates is None else 1e6 * rates.floor(step.read + step.written) for step in self.steps]
        sums = {"entry_bytes": self.entry_bytes, "moved_bytes": self.moved_bytes, "floors_us": floors}
        share = {"total_bytes": self.total_bytes, "share_of_full": self.total_bytes / self.full_bytes}
        return {**attrs.asdict(self), **sums, **share}

    def table(self) -> Group:
        """The explanation as rich tables: memory, budgets, steps."""
        where = f"{self.dtype} on {self.rates.name if self.rates else self.device}"
        head = f"policy {self.policy} ({self.digest}): one sequence of {self.length} tokens, {where}"
        always = {"entries held, at capacity": self.held_bytes, "queries observed": self.window_bytes}
        some = {"carried beside them": self.state_bytes, "layers with a sliding window": self.stock_bytes}
        sizes = always | {name: count for name, count in some.items() if count} | {"held in all": self.total_bytes}
        layers = [(share.layer, share.budget, share.capacity) for share in self.layers]
        return Group(
            Text("\n".join(filter(None, (head, self.assumed, self.raised)))),
            memory_table(sizes, self.full_bytes, self.columns, evicts=self.evicts, whole_prompt=self.whole_prompt),
            budgets_table(layers, *self.protected, competing=self.competing, at_most=self.at_most),
            steps_table(self.steps, self.moved_bytes, self.unfused, self.rates),
        )

    def __str__(self) -> str:
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def explain(plan: Plan, length: int = LENGTH, rates: Device | None = None) -> Explanation:
    """What `plan` does to one sequence that grows to `length` tokens.

    The steps are those of a compression while decoding; for a policy that compresses prompts only, of a prompt of that
    length. `rates` are those of the device that floors are stated for. Raises InputError when `length` is below 1.
    """
    if length < 1:
        raise InputError(f"length must be at least 1 token: {length}")
    budgets, footprint = plan.budgets, plan.footprint
    capacities = _capacities(plan, length)
    return Explanation(
        policy=plan.spec.name,
        digest=digest(plan.spec),
        geometry=plan.geometry,
        device=str(plan.device),
        dtype=str(plan.dtype).removeprefix("torch."),
        length=length,
        evicts=min(capacities) < length,
        layers=tuple(map(LayerShare, plan.geometry.managed, budgets.per_layer(length), capacities)),
        protected=budgets.protected(length),
        raised=budgets.raised(length),
        assumed="" if plan.spec.budget.generated is None else _ALL_GENERATED,
        competing=plan.compresses_jointly,
        at_most=not plan.spec.allocate.divider.exact,
        whole_prompt=plan.spec.compress.prefill and (plan.compresses_jointly or bool(plan.passes)),
        columns=footprint.per_entry(),
        unfused=plan.fusion.off,
        rates=rates,
        steps=steps_of(plan, _shapes(plan, length)),
        held_bytes=round(sum(footprint.layer_bytes(layer, capacity) for layer, capacity in enumerate(capacities))),
        window_bytes=footprint.window_bytes,
        state_bytes=footprint.state_bytes,
        stock_bytes=footprint.stock_bytes(length),
        full_bytes=footprint.full_bytes(length) + footprint.stock_bytes(length),
    )


def _capacities(plan: Plan, length: int) -> tuple[int, ...]:
    budgets = plan.budgets.per_layer(length)
    if plan.compresses_while_decoding:
        return tuple(min(budget + plan.budgets.slack, length) for budget in budgets)
    return budgets if plan.spec.compress.prefill else (length,) * len(budgets)


def _shapes(plan: Plan, length: int) -> Shapes:
    kept, slack = plan.budgets.average(length), plan.budgets.slack
    protected = plan.budgets.protected(length)
    if plan.compresses_while_decoding:
        return Shapes(kept + slack, kept, slack, tuple(range(kept + 1, kept + slack + 1)), protected)
    return Shapes(length, min(kept, length), length, (length,), protected)
