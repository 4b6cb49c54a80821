"""Attention over what a layer holds."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvpolicy.attention.attended_slots import NO_POSITIONS, AttendedSlots
from kvpolicy.attention.blockwise import attend_blockwise, grouped_queries, is_joined, observe_queries, visible
from kvpolicy.attention.decode_kernel import attend_in_kernel
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.storage.layer_storage import LayerStorage, PaddedRows
from kvpolicy.cache.storage.segment_index import SingleSegment
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.plan.compress.kernel_errors import kernel_errors, note_once
from kvpolicy.plan.forward_observers import ForwardObserver
from kvpolicy.plan.plan import LOG_VOTES

_COPIED = 2**13  # numbers of the keys of a head: to copy as many takes as long as a call of attention for that head


def attend(
    storage: LayerStorage,
    batch: QueryBatch,
    slots: Tensor | None = None,
    observers: Sequence[ForwardObserver] = (),
    *,
    pads: bool,
    dropout: float = 0.0,
    kernels: bool = False,
) -> Tensor:
    """Attention of the queries over held entries at positions up to their own, [B, H, q, Dv].

    `slots` [B, K, n] are those that a reader chose, ascending, -1 behind; None = all. `pads` says that there may be
    pads among the slots. `observers` see the logits of this call. `kernels` says whether a kernel may do it, and
    has compacted the entries.
    """
    if kernels and batch.queries.shape[2] == 1 and not dropout and isinstance(storage, SegmentedStorage):
        try:
            return attend_in_kernel(storage, batch, slots, observers, pads=pads)
        except kernel_errors() as error:
            note_once(f"attention over held entries runs without a kernel: {error}")
    if batch.queries.shape[2] == 1 and slots is None and not observers and not pads:
        plain, even = storage.is_plain, storage.is_block and storage.is_even
        if even and plain:
            return _at_a_step(storage, batch, dropout)
        if even and is_joined(storage.heads, storage.longest, batch):
            return _at_a_step_unpacked(storage, batch, dropout)
    if slots is None and not observers and not pads and not storage.is_block and storage.is_plain:
        return _over_ragged_heads(storage, batch, dropout)
    if storage.is_block:
        part = AttendedSlots(storage, storage.everything, slots, clears=kernels and not storage.is_even)
        return _attend(part, batch, observers, full=storage.is_even and not pads and slots is None, dropout=dropout)
    heads = [
        _attend(part, own, observers, full=not pads, dropout=dropout) for part, own in _segments(storage, batch, slots)
    ]
    starts = range(0, len(heads), storage.heads)
    return torch.cat([torch.cat(heads[start : start + storage.heads], 1) for start in starts])


def _at_a_step(storage: LayerStorage, batch: QueryBatch, dropout: float) -> Tensor:
    """One query a row, over heads of the same length that hold no pads: one call, and nothing around it."""
    votes = storage.column(LOG_VOTES, storage.everything) if LOG_VOTES in storage.columns else None
    bias = None if votes is None else votes[:, :, None].to(batch.queries.dtype)
    return _one_query(batch.queries, *storage.all_states(), bias, scale=batch.scaling, dropout_p=dropout)


def _at_a_step_unpacked(storage: LayerStorage, batch: QueryBatch, dropout: float) -> Tensor:
    """As `_at_a_step`, over few entries, some of them packed: one call in the bases in which codes are read."""
    part, everything = AttendedSlots(storage, storage.everything), slice(0, storage.longest)
    queries = part.queries_to_basis(grouped_queries(part, batch))
    keys, values = part.keys_in_basis(everything, queries.dtype), part.values_in_basis(everything, queries.dtype)
    votes = part.log_votes
    bias = None if votes is None else votes[:, :, None].to(queries.dtype)
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=batch.scaling, dropout_p=dropout)
    return part.from_basis(out).reshape(*batch.queries.shape[:3], -1).to(batch.queries.dtype)


def _over_ragged_heads(storage: LayerStorage, batch: QueryBatch, dropout: float) -> Tensor:
    """Queries over heads of different length that hold no pads: the newest entries are those of the queries.

    Rows whose heads are short are copied, those with copies of the same length for one call; of the others each head is
    a call. Which, and how long a copy is, depends on nothing but the row: another row does not change what is computed.
    """
    padded, options = storage.padded_rows(_COPIED), {"scale": batch.scaling, "dropout_p": dropout}
    queries = batch.queries.contiguous()  # strides may decide how it is computed
    if len(padded) == 1 and len(padded[0].rows) == storage.rows:
        return _padded(padded[0], queries, options)
    outputs: dict[int, Tensor] = {}
    for alike in padded:
        outputs.update(zip(alike.rows, _padded(alike, queries[list(alike.rows)], options).split(1), strict=True))
    for row, own in enumerate(queries.split(1)):
        if row not in outputs:
            outputs[row] = _one_by_one(storage, row, own, options)
    return torch.cat([outputs[row] for row in range(storage.rows)])


def _padded(held: PaddedRows, queries: Tensor, options: dict[str, Any]) -> Tensor:
    count, length = queries.shape[2], held.keys.shape[2]
    seen = None if held.in_use is None else held.in_use[:, :, None]
    if count > 1:
        ends = length if held.in_use is None else held.in_use.sum(-1)[..., None, None]
        places = torch.arange(length, device=queries.device)
        seen = (places < ends - _newer(count, queries.device)).expand(*held.keys.shape[:2], -1, -1)
    return _over(queries, held.keys, held.values, _with_votes(held.log_votes, seen, queries.dtype), options)


def _one_by_one(storage: LayerStorage, row: int, queries: Tensor, options: dict[str, Any]) -> Tensor:
    """A call for each head of a row, [1, H, q, Dv]."""
    count, longest = queries.shape[2], max(storage.lengths[row])
    seen = None
    if count > 1:
        places = torch.arange(longest, device=queries.device)
        seen = (places < longest - _newer(count, queries.device))[None, None]
    outputs = []
    for head, (length, own) in enumerate(zip(storage.lengths[row], queries.chunk(storage.heads, 1), strict=True)):
        at = SingleSegment(row, head)
        keys, values = (states.read(at, 0, length, NO_POSITIONS) for states in (storage.keys, storage.values))
        votes = storage.column(LOG_VOTES, at) if LOG_VOTES in storage.columns else None
        ours = None if seen is None else seen[..., longest - length :]  # the newest are the last of all heads
        outputs.append(_over(own, keys, values, _with_votes(votes, ours, queries.dtype), options))
    return torch.cat(outputs, 1)


def _newer(count: int, device: torch.device) -> Tensor:
    """How many of q tokens come behind each, [q, 1]."""
    return torch.arange(count - 1, -1, -1, device=device)[:, None]


def _with_votes(votes: Tensor | None, seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the logits: log-votes [b, k, T], of what a query sees, bool [b, k or 1, q, T]; None = all."""
    if votes is None:
        return seen
    bias = votes[:, :, None].to(dtype)
    return bias if seen is None else bias.expand(seen.shape).masked_fill(~seen, -torch.inf)


def _over(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The library's attention, [b, H, q, Dv]; `bias` is [b, 1 or k, q, T], and None where every query sees all."""
    group, count = queries.shape[1] // keys.shape[1], queries.shape[2]
    if count == 1:
        return _one_query(queries, keys, values, bias, **options)
    if bias is not None and bias.shape[1] > 1:
        bias = bias.repeat_interleave(group, 1)
    return scaled_dot_product_attention(queries, keys, values, attn_mask=bias, enable_gqa=group > 1, **options)


def _one_query(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """[B, H, 1, Dv]: a group's queries stand in for query tokens of one head, so that keys are read once."""
    grouped = queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[3])
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, **options)
    return out.reshape(*queries.shape[:3], -1)


def observe_only(storage: LayerStorage, batch: QueryBatch, observers: Sequence[ForwardObserver]) -> None:
    """Let observers see queries whose attention was computed elsewhere."""
    if storage.is_block:
        observe_queries(AttendedSlots(storage, storage.everything), batch, observers)
        return
    for part, own in _segments(storage, batch, None):
        observe_queries(part, own, observers)


def _segments(
    storage: LayerStorage, batch: QueryBatch, slots: Tensor | None
) -> Iterator[tuple[AttendedSlots, QueryBatch]]:
    group = batch.queries.shape[1] // storage.heads
    for row in range(storage.rows):
        for head in range(storage.heads):
            chosen = None if slots is None else slots[row : row + 1, head : head + 1]
            if chosen is not None:
                chosen = chosen[chosen >= 0][None, None]
            yield AttendedSlots(storage, SingleSegment(row, head), chosen), batch.of_segment(row, head, group)


def _attend(
    part: AttendedSlots, batch: QueryBatch, observers: Sequence[ForwardObserver], *, full: bool, dropout: float
) -> Tensor:
    """One call for all heads of `part`; `full` says that no slot among them is empty."""
    if observers or not part.storage.is_plain:
        return attend_blockwise(part, batch, observers, dropout, full=full and part.slots is None)
    everything = slice(0, part.length)
    options = {"scale": batch.scaling, "dropout_p": dropout}
    return _at_once(part, batch, part.keys(everything), part.values(everything), options, full=full)


def _at_once(
    part: AttendedSlots, batch: QueryBatch, keys: Tensor, values: Tensor, options: dict[str, Any], *, full: bool
) -> Tensor:
    sees_all = batch.queries.shape[2] == 1 and full and part.log_votes is None
    bias = None if sees_all else _bias(part, batch.positions, batch.queries.dtype)
    return _over(batch.queries, keys, values, bias, options)


def _bias(part: AttendedSlots, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What is added to the logits: bool [B, 1, q, T], or [B, K, q, T] with votes (a float) or chosen slots.

    Held entries are older than the chunk, whichever they are, so heads differ in what they hold and not in which
    slots a query sees: one head's positions stand for all, unless votes or choices differ.
    """
    votes = part.log_votes
    shown = part.positions if part.slots is not None or votes is not None else part.positions[:, :1]
    return _with_votes(votes, visible(shown, positions), dtype)
