"""One compression of static layers: the same step as anywhere, on all slots, without a decision of the host."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.integrations.transformers.decode_graph.static_layer import StaticLayer, layers
from kvpolicy.integrations.transformers.decode_graph.static_slots import StaticSlots
from kvpolicy.plan.compress.kernel_errors import kernel_errors, note_once
from kvpolicy.plan.compress.scored import ScoredLayers
from kvpolicy.plan.compress.step import choose_on_device
from kvpolicy.plan.plan import POSITIONS, Plan
from kvpolicy.stages import View
from kvpolicy_kernels import Column, Segments


def evict(static: Sequence[StaticLayer], due: Tensor, budgets: Tensor, tokens: Tensor, nan: Tensor) -> None:
    """Reduce the rows that are `due` [L, B] bool to `budgets` [L, B] int64 entries per KV head; others keep everything.

    `tokens` [B] int64 are those that each row has had. How many of the scores were NaN, and how many scores there were,
    is added to `nan` [2] int64.

    A compiled graph has this as one operator: plugins are anybody's Python, and need not be traceable.
    """
    if torch.compiler.is_compiling():
        tensors = [tensor for layer in static for tensor in layer.slots.tensors]
        window = [tensor for layer in static for tensor in layer.slots.window]
        _evict_op([layer.name for layer in static], [*tensors, nan], window, due, budgets, tokens)
    else:
        _evict(static, [layer.slots for layer in static], due, budgets, tokens, nan)


@torch.library.custom_op("kvpolicy::evict", mutates_args={"tensors"})
def _evict_op(
    names: list[int], tensors: list[Tensor], window: list[Tensor], due: Tensor, budgets: Tensor, tokens: Tensor
) -> None:
    *entries, nan = tensors
    count, queries = len(entries) // len(names), len(window) // len(names)
    held = [
        layers[name].slots.standing_in(entries[i * count :][:count], window[i * queries :][:queries])
        for i, name in enumerate(names)
    ]
    _evict([layers[name] for name in names], held, due, budgets, tokens, nan)


@_evict_op.register_fake
def _(*_arguments: object) -> None:
    """Nothing comes out."""


def _evict(
    static: Sequence[StaticLayer],
    held: Sequence[StaticSlots],
    due: Tensor,
    budgets: Tensor,
    tokens: Tensor,
    nan: Tensor,
) -> None:
    plan = static[0].plan
    views = [slots.view(plan, layer.ordinal, layer.scaling) for layer, slots in zip(static, held, strict=True)]
    kept, groups = _choose(plan, views, due, budgets, tokens)
    wrong, room = (torch.cat(each) for each in zip(*((group.nan, group.room.sum(-1)) for group in groups), strict=True))
    nan.add_((torch.stack([wrong, room]) * due).flatten(1).sum(1))
    observed = [fresh for group in groups for fresh in group.observed]
    for slots, fresh, rows in zip(held, observed, due, strict=True):
        for name, values in fresh.items():
            column = slots.columns[name]
            column.copy_(torch.where(rows[:, None, None], values, column))
    if not plan.fusion.off and _compact_in_kernels(plan, held, kept):
        return
    for slots, indices in zip(held, kept, strict=True):
        _compact(slots, indices)


def _choose(
    plan: Plan, views: Sequence[View], due: Tensor, budgets: Tensor, tokens: Tensor
) -> tuple[list[Tensor], list[ScoredLayers]]:
    """StaticSlots that stay, [B, K, C] for each layer, and what was computed of them; in kernels all layers at once."""
    if not plan.fusion.off and len({view.scaling for view in views}) == 1:
        try:
            kept, group = choose_on_device(plan.spec, plan.fusion, views, due, budgets, tokens)
        except kernel_errors() as error:
            note_once(f"policy {plan.spec.name}: compressions of fixed shapes run without kernels: {error}")
        else:
            return kept, [group]
    each = [
        choose_on_device(plan.spec, None, [view], rows[None], budget[None], tokens)
        for view, rows, budget in zip(views, due, budgets, strict=True)
    ]
    return [kept for (kept,), _ in each], [group for _, group in each]


def _compact_in_kernels(plan: Plan, held: Sequence[StaticSlots], kept: Sequence[Tensor]) -> bool:
    """What `_compact` does to all layers, in one launch; False, and nothing done, where kernels cannot."""
    from kvpolicy_kernels.compact.compact import compact

    try:
        segments = _segments(held)
        padded = [torch.nn.functional.pad(one, (0, segments.longest - one.shape[-1]), value=-1) for one in kept]
        names = [name for name in held[0].columns if name != POSITIONS]
        columns = [Column.of([slots.columns[name] for slots in held]) for name in names]
        columns += [Column.of([slots.keys for slots in held]), Column.of([slots.values for slots in held])]
        positions = Column.of([slots.columns[POSITIONS] for slots in held])
        moved = torch.cat([one.flatten(0, 1) for one in padded]).int()
        compact(segments, moved, columns, ordered=True, positions=positions)
    except kernel_errors() as error:
        note_once(f"policy {plan.spec.name}: entries of fixed shapes are moved without kernels: {error}")
        return False
    for slots, indices in zip(held, kept, strict=True):
        slots.lengths.copy_((indices[:, 0] >= 0).sum(-1))
    return True


def _segments(held: Sequence[StaticSlots]) -> Segments:
    shape = held[0].keys.shape[:2]
    lengths = torch.stack([slots.lengths[:, None].expand(shape) for slots in held])
    return Segments.of([slots.keys for slots in held], lengths)


def _compact(held: StaticSlots, kept: Tensor) -> None:
    """Move the slots that stay [B, K, C] to the front, in their order.

    Those behind the last one repeat the first: an evicted one could be NaN, and a masked slot is still multiplied.
    """
    behind = kept < 0
    rows, heads, capacity = kept.shape
    starts = torch.arange(rows * heads, device=kept.device).view(rows, heads, 1) * capacity
    sources = (starts + torch.where(behind, kept[..., :1].clamp(min=0), kept)).flatten()
    for tensor in (held.keys, held.values, *held.columns.values()):
        slots = tensor.flatten(0, 2)
        slots.copy_(slots.index_select(0, sources))
    held.columns[POSITIONS].masked_fill_(behind, -1)
    held.lengths.copy_((~behind[:, 0]).sum(-1))
