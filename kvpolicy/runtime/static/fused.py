"""One compression of all static layers in kernels, without a decision of the host."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvpolicy.plan.fallback import note_once
from kvpolicy.plan.fused import counts_together, score_together
from kvpolicy.plan.layers import Layers
from kvpolicy.plan.plan import POSITIONS, Plan
from kvpolicy.plan.refusals import refusals
from kvpolicy.runtime.static.slots import Slots
from kvpolicy.stages import View
from kvpolicy.stages.slots import gather
from kvpolicy_kernels import Column


def evict_in_kernels(
    plan: Plan, held: Sequence[Slots], views: Sequence[View], due: Tensor, budgets: Tensor, nan: Tensor
) -> bool:
    """What `evict` does to all layers, whose `views` these are; False, and nothing done, where kernels cannot."""
    if plan.fusion.off or plan.fusion.select or len({view.scaling for view in views}) > 1:
        return False
    try:
        layers = Layers.of(views)
        kept, wrong, observed = _chosen(plan, layers, due, budgets)
        _compact(layers, held, kept.flatten(0, 2), set(observed[0]))
    except refusals() as error:
        note_once(f"policy {plan.spec.name}: compressions of fixed shapes run without kernels: {error}")
        return False
    shape = kept.shape[:3]
    counted = torch.stack([wrong.view(shape), layers.room.view(shape)]) * due[..., None]
    nan.add_(counted.flatten(1).sum(1))
    for own, slots, fresh, rows in zip(kept, held, observed, due, strict=True):
        _settle(slots, own, fresh, rows)
    return True


def _chosen(
    plan: Plan, layers: Layers, due: Tensor, budgets: Tensor
) -> tuple[Tensor, Tensor, Sequence[Mapping[str, Tensor]]]:
    """Slots that stay [L, B, K, C] int32, all of them where nothing is due; NaN scores [P]; new state of each layer."""
    from kvpolicy_kernels.select import select

    total, wrong, observed = score_together(plan.fusion, layers)
    counts = counts_together(plan.spec, plan.fusion, layers, total, budgets)
    counts = counts.where(due.flatten()[:, None], layers.room).flatten()
    segments, positions = layers.segments, layers.columns[POSITIONS]
    kept = select(total, segments, counts, segments.longest, positions=positions, **layers.protect)
    return kept.view(segments.layers, segments.rows, segments.heads, -1), wrong, observed


def _compact(layers: Layers, held: Sequence[Slots], kept: Tensor, fresh: set[str]) -> None:
    """Move what stays to the front, in its order; columns that have `fresh` values do not move."""
    from kvpolicy_kernels.compact import compact

    names = [name for name in held[0].columns if name != POSITIONS and name not in fresh]
    moving = [Column.of([slots.columns[name] for slots in held]) for name in names]
    moving += [layers.columns["keys"], layers.columns["values"]]
    compact(layers.segments, kept, moving, ordered=True, positions=layers.columns[POSITIONS])


def _settle(slots: Slots, kept: Tensor, fresh: Mapping[str, Tensor], due: Tensor) -> None:
    """What is not moved: new state, and lengths."""
    kept = kept[..., : slots.keys.shape[2]].long()
    for name, values in fresh.items():
        old = slots.columns[name]
        old.copy_(gather(torch.where(due[:, None, None], values, old), kept))
    slots.lengths.copy_((kept[:, 0] >= 0).sum(-1))
