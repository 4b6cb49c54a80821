"""The attention of a decode step in one kernel: all rows and heads at once, whatever each of them holds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.plan.followers import ATTENTION, Follower
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS
from kvpolicy.runtime.access import Segment
from kvpolicy.runtime.asked import Asked
from kvpolicy.runtime.blockwise import follow
from kvpolicy.runtime.half import Half
from kvpolicy.runtime.holdings import Holdings
from kvpolicy.runtime.part import Part
from kvpolicy.runtime.store import Store
from kvpolicy.stages import Glimpse
from kvpolicy_kernels import Column, Segments, UnsupportedInputError
from kvpolicy_kernels.attention import kv_input
from kvpolicy_kernels.common.segments import addresses_of


def attend_in_kernel(
    holdings: Holdings, asked: Asked, slots: Tensor | None, followers: Sequence[Follower], *, pads: bool
) -> Tensor:
    """What `attend` gives for one query a row, [B, H, 1, Dv]; followers see the logits of the same pass.

    Raises:
        UnsupportedInputError: the kernel cannot do this; nothing has changed.
    """
    from kvpolicy_kernels.attention.decode import decode

    layout = holdings.slots.layout
    count, group = layout.rows * layout.heads, asked.queries.shape[1] // layout.heads
    queries = asked.queries.reshape(count, group, asked.queries.shape[3]).contiguous()
    others = [one for one in followers if ATTENTION not in one.columns.values()]
    _require_shown(holdings, slots, others)
    longest = holdings.slots.longest if slots is None else slots.shape[2]
    logits = queries.new_empty((count, group, longest), dtype=torch.float32) if others else None
    mass = _column(holdings.slots, ATTENTION) if len(others) < len(followers) else None
    out = decode(
        queries,
        _held(holdings, pads=pads),
        asked.scaling,
        query_positions=asked.positions[:, 0].contiguous() if pads else None,
        slots=None if slots is None else slots.flatten(0, 1).contiguous(),
        extra=kv_input.ExtraOutputs(logits, mass),
    )
    if logits is not None:
        _show(holdings, slots, logits, others)
    return out.view(layout.rows, layout.heads * group, 1, -1)


def _held(holdings: Holdings, *, pads: bool) -> kv_input.KVInput:
    slots = holdings.slots
    starts, lengths = slots.starts, slots.lengths_on_device
    segments = Segments(starts, lengths, 1, slots.layout.rows, slots.layout.heads, slots.longest)
    return kv_input.KVInput(
        segments,
        _half(holdings.keys),
        _half(holdings.values),
        positions=_column(slots, POSITIONS) if pads else None,
        votes=_column(slots, LOG_VOTES) if LOG_VOTES in slots.columns else None,
        entries=round(slots.average * segments.count),
    )


def _half(half: Half) -> kv_input.KVTensorInput:
    packed = None
    if not half.is_plain:
        how = half.form.unpacking()
        if isinstance(how, str):
            raise UnsupportedInputError(f"{type(half.form).__name__} {how}")
        columns = tuple(_column(half.packed, name) for name in half.form.columns)
        packed = kv_input.PackedInput(how, half.packed.starts, half.packed.lengths_on_device, columns)
    return kv_input.KVTensorInput(_column(half.tail, half.name), half.tail.starts, packed)


def _column(store: Store, name: str) -> Column:
    flat = store.tensors[name]
    width = max(1, flat.shape[1:].numel())
    return Column(addresses_of([flat]), flat.dtype, width, (flat,))


def _require_shown(holdings: Holdings, slots: Tensor | None, followers: Sequence[Follower]) -> None:
    if followers and slots is not None and holdings.slots.layout.uniform is None:
        raise UnsupportedInputError("heads of different length are read in part, and followed")


def _show(holdings: Holdings, slots: Tensor | None, logits: Tensor, followers: Sequence[Follower]) -> None:
    """Let followers see the logits [B·K, G, T] of one query."""
    layout = holdings.slots.layout
    shaped = logits.unflatten(0, (layout.rows, layout.heads))[:, :, :, None]
    if layout.uniform is not None:
        part = Part(holdings, holdings.everything, slots)
        follow(part, Glimpse(shaped, part.log_votes), 0, followers)
        return
    for row in range(layout.rows):
        for head in range(layout.heads):
            part = Part(holdings, Segment(row, head))
            own = shaped[row : row + 1, head : head + 1, ..., : part.length]
            follow(part, Glimpse(own, part.log_votes), 0, followers)
