"""The attention of a decode step in one kernel: all rows and heads at once, whatever each of them holds."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvpolicy.attention.attended_slots import AttendedSlots
from kvpolicy.attention.blockwise import update_observers
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.storage.kv_tensor import KVTensor
from kvpolicy.cache.storage.segment_index import SingleSegment
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.cache.storage.slot_store import SlotStore
from kvpolicy.plan.forward_observers import ATTENTION, ForwardObserver
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS
from kvpolicy.stages import QueryLogits
from kvpolicy_kernels import Column, Segments, UnsupportedInputError
from kvpolicy_kernels.attention import kv_input
from kvpolicy_kernels.common.segments import addresses_of


def attend_in_kernel(
    storage: SegmentedStorage,
    batch: QueryBatch,
    slots: Tensor | None,
    observers: Sequence[ForwardObserver],
    *,
    pads: bool,
) -> Tensor:
    """What `attend` gives for one query a row, [B, H, 1, Dv]; observers see the logits of the same pass.

    Raises:
        UnsupportedInputError: the kernel cannot do this; nothing has changed.
    """
    from kvpolicy_kernels.attention.decode import decode

    layout = storage.slots.layout
    count, group = layout.rows * layout.heads, batch.queries.shape[1] // layout.heads
    held = _held(storage, pads=pads)
    queries = batch.queries.reshape(count, group, batch.queries.shape[3]).contiguous()
    if _in_basis(held.keys):
        queries = _turned(queries, storage.keys.form.queries_to_basis)
    others = [observer for observer in observers if ATTENTION not in observer.columns.values()]
    _require_shown(storage, slots, others)
    longest = storage.slots.longest if slots is None else slots.shape[2]
    logits = queries.new_empty((count, group, longest), dtype=torch.float32) if others else None
    mass = _column(storage.slots, ATTENTION) if len(others) < len(observers) else None
    out = decode(
        queries,
        held,
        batch.scaling,
        query_positions=batch.positions[:, 0].contiguous() if pads else None,
        slots=None if slots is None else slots.flatten(0, 1).contiguous(),
        extra=kv_input.ExtraOutputs(logits, mass),
    )
    if logits is not None:
        _show(storage, slots, logits, others, batch.scaling)
    if _in_basis(held.values):
        out = _turned(out, storage.values.form.from_basis)
    return out.view(layout.rows, layout.heads * group, 1, -1)


def _held(storage: SegmentedStorage, *, pads: bool) -> kv_input.KVInput:
    slots = storage.slots
    starts, lengths = slots.starts, slots.lengths_on_device
    segments = Segments(starts, lengths, 1, slots.layout.rows, slots.layout.heads, slots.longest)
    return kv_input.KVInput(
        segments,
        _input(storage.keys),
        _input(storage.values),
        positions=_column(slots, POSITIONS) if pads else None,
        votes=_column(slots, LOG_VOTES) if LOG_VOTES in slots.columns else None,
        entries=round(slots.average * segments.count),
    )


def _input(states: KVTensor) -> kv_input.KVTensorInput:
    if states.is_plain:
        return kv_input.KVTensorInput(_column(states.residual, states.name), states.residual.starts)
    how = states.form.unpacking()
    if isinstance(how, str):
        raise UnsupportedInputError(f"{type(states.form).__name__} {how}")
    columns = tuple(_column(states.packed, name) for name in states.form.columns)
    packed = kv_input.PackedInput(how, states.packed.starts, states.packed.lengths_on_device, columns)
    residual = _column_in_basis(states) if how.in_basis else _column(states.residual, states.name)
    return kv_input.KVTensorInput(residual, states.residual.starts, packed)


def _column_in_basis(states: KVTensor) -> Column:
    """The residual, which is short, in the basis of what is packed."""
    vectors = _turned(states.residual.tensors[states.name], states.form.to_basis)
    # New memory each time: a table that the host copies is not in the cache, and none is copied in a CUDA graph.
    addresses = torch.full((1,), vectors.data_ptr(), dtype=torch.int64, device=vectors.device)
    return Column(addresses, vectors.dtype, vectors.shape[1], (vectors,))


def _in_basis(states: kv_input.KVTensorInput) -> bool:
    return states.packed is not None and states.packed.unpacking.in_basis


def _turned(vectors: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """Vectors in another basis, in the same dtype; a number beyond its range becomes the largest one."""
    limit = torch.finfo(vectors.dtype).max
    return turn(vectors.to(torch.promote_types(vectors.dtype, torch.float32))).clamp(-limit, limit).to(vectors.dtype)


def _column(store: SlotStore, name: str) -> Column:
    flat = store.tensors[name]
    width = max(1, flat.shape[1:].numel())
    return Column(addresses_of([flat]), flat.dtype, width, (flat,))


def _require_shown(storage: SegmentedStorage, slots: Tensor | None, observers: Sequence[ForwardObserver]) -> None:
    if observers and slots is not None and storage.slots.layout.uniform is None:
        raise UnsupportedInputError("heads of different length are read in part, and observed")


def _show(
    storage: SegmentedStorage,
    slots: Tensor | None,
    logits: Tensor,
    observers: Sequence[ForwardObserver],
    scaling: float,
) -> None:
    """Let observers see the logits [B·K, G, T] of one query."""
    layout = storage.slots.layout
    shaped = logits.unflatten(0, (layout.rows, layout.heads))[:, :, :, None]
    if layout.uniform is not None:
        part = AttendedSlots(storage, storage.everything, slots)
        update_observers(part, QueryLogits(shaped, part.log_votes, scaling=scaling), 0, observers)
        return
    for row in range(layout.rows):
        for head in range(layout.heads):
            part = AttendedSlots(storage, SingleSegment(row, head))
            own = shaped[row : row + 1, head : head + 1, ..., : part.length]
            update_observers(part, QueryLogits(own, part.log_votes, scaling=scaling), 0, observers)
