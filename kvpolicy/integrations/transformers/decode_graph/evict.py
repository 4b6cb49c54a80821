"""One compression of static layers: the same step as anywhere, on all slots, without a decision of the host."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.cache.compaction.batched_compaction import move_in_kernel
from kvpolicy.cache.storage.fixed_storage import close_up
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.integrations.transformers.decode_graph.static_layer import StaticLayer, layers
from kvpolicy.plan.compress.kernel_errors import kernel_errors, note_once
from kvpolicy.plan.compress.scored import ScoredLayers
from kvpolicy.plan.compress.step import choose_on_device
from kvpolicy.plan.plan import Plan
from kvpolicy.stages import View


def evict(static: Sequence[StaticLayer], due: Tensor, budgets: Tensor, tokens: Tensor, nan: Tensor) -> None:
    """Reduce the rows that are `due` [L, B] bool to `budgets` [L, B] int64 entries per KV head; others keep everything.

    `tokens` [B] int64 are those that each row has had. How many of the scores were NaN, and how many scores there were,
    is added to `nan` [2] int64.

    A compiled graph has this as one operator: plugins are anybody's Python, and need not be traceable.
    """
    if torch.compiler.is_compiling():
        tensors = [tensor for layer in static for tensor in layer.in_step]
        windows = [tensor for layer in static for tensor in layer.window.in_step]
        _evict_op([layer.name for layer in static], [*tensors, nan], windows, due, budgets, tokens)
    else:
        storages, windows_in_step = zip(
            *((layer.storage.in_step, layer.window.in_step) for layer in static), strict=True
        )
        _evict(static, storages, windows_in_step, due, budgets, tokens, nan)


@torch.library.custom_op("kvpolicy::evict", mutates_args={"tensors"})
def _evict_op(
    names: list[int], tensors: list[Tensor], windows: list[Tensor], due: Tensor, budgets: Tensor, tokens: Tensor
) -> None:
    *in_step, nan = tensors
    static = [layers[name] for name in names]
    storages = [layer.storage.over(own) for layer, own in zip(static, _equal_parts(in_step, len(static)), strict=True)]
    _evict(static, storages, _equal_parts(windows, len(static)), due, budgets, tokens, nan)


@_evict_op.register_fake
def _(*_arguments: object) -> None:
    """Nothing comes out."""


def _equal_parts(tensors: Sequence[Tensor], count: int) -> list[Sequence[Tensor]]:
    size = len(tensors) // count
    return [tensors[part * size : (part + 1) * size] for part in range(count)]


def _evict(
    static: Sequence[StaticLayer],
    storages: Sequence[SegmentedStorage],
    windows: Sequence[Sequence[Tensor]],
    due: Tensor,
    budgets: Tensor,
    tokens: Tensor,
    nan: Tensor,
) -> None:
    """`storages` and `windows` are what a step sees of each layer."""
    plan = static[0].plan
    views = [layer.view(*seen) for layer, seen in zip(static, zip(storages, windows, strict=True), strict=True)]
    kept, groups = _choose(plan, views, due, budgets, tokens)
    wrong, room = (torch.cat(each) for each in zip(*((group.nan, group.room.sum(-1)) for group in groups), strict=True))
    nan.add_((torch.stack([wrong, room]) * due).flatten(1).sum(1))
    observed = [fresh for group in groups for fresh in group.observed]
    for storage, fresh, rows in zip(storages, observed, due, strict=True):
        for name, values in fresh.items():
            column = storage.column(name, storage.everything)
            storage.write_column(name, storage.everything, torch.where(rows[:, None, None], values, column))
    if not plan.fusion.off and _close_up_in_kernel(plan, storages, kept):
        return
    for storage, slots in zip(storages, kept, strict=True):
        close_up(storage, slots)


def _choose(
    plan: Plan, views: Sequence[View], due: Tensor, budgets: Tensor, tokens: Tensor
) -> tuple[list[Tensor], list[ScoredLayers]]:
    """Slots that stay, [B, K, C] for each layer, and what was computed of them; in kernels all layers at once."""
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


def _close_up_in_kernel(plan: Plan, storages: Sequence[SegmentedStorage], kept: Sequence[Tensor]) -> bool:
    """What `close_up` does, to all layers in one launch; False, and nothing done, where kernels cannot."""
    try:
        lengths = move_in_kernel(storages, kept, ordered=True)
    except kernel_errors() as error:
        note_once(f"policy {plan.spec.name}: entries of fixed shapes are moved without kernels: {error}")
        return False
    for storage, left in zip(storages, lengths.view(len(storages), -1), strict=True):
        storage.slots.lengths_on_device.copy_(left)
    return True
