"""Attention over what a layer holds."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvpolicy.attention.attended_slots import AttendedSlots
from kvpolicy.attention.blockwise import attend_blockwise, grouped_queries, is_joined, observe_queries, visible
from kvpolicy.attention.decode_kernel import attend_in_kernel
from kvpolicy.attention.ragged_heads import are_short, attend_to_ragged_heads
from kvpolicy.attention.sdpa import attend_to, one_query, with_votes
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.storage.layer_storage import LayerStorage
from kvpolicy.cache.storage.segment_index import SingleSegment
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.plan.compress.kernel_errors import kernel_errors, note_once
from kvpolicy.plan.forward_observers import ForwardObserver
from kvpolicy.plan.plan import LOG_VOTES


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
    if slots is None and not observers and not pads:
        plain, one_length = storage.is_plain, storage.is_block and storage.is_even
        if one_length and batch.queries.shape[2] == 1:
            if plain:
                return _at_a_step(storage, batch, dropout)
            if is_joined(storage.heads, storage.longest, batch):
                return _at_a_step_unpacked(storage, batch, dropout)
        if not storage.is_block and (plain or are_short(storage, batch)):
            return attend_to_ragged_heads(storage, batch, dropout)
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
    return one_query(batch.queries, *storage.all_states(), bias, scale=batch.scaling, dropout_p=dropout)


def _at_a_step_unpacked(storage: LayerStorage, batch: QueryBatch, dropout: float) -> Tensor:
    """As `_at_a_step`, over few entries, some of them packed: one call in the bases in which codes are read."""
    part, everything = AttendedSlots(storage, storage.everything), slice(0, storage.longest)
    queries = part.queries_to_basis(grouped_queries(batch, storage.heads))
    keys, values = part.keys_in_basis(everything, queries.dtype), part.values_in_basis(everything, queries.dtype)
    votes = part.log_votes
    bias = None if votes is None else votes[:, :, None].to(queries.dtype)
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=batch.scaling, dropout_p=dropout)
    return part.from_basis(out).reshape(*batch.queries.shape[:3], -1).to(batch.queries.dtype)


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
    return attend_to(batch.queries, keys, values, bias, options)


def _bias(part: AttendedSlots, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What is added to the logits: bool [B, 1, q, T], or [B, K, q, T] with votes (a float) or chosen slots.

    Held entries are older than the chunk, whichever they are, so heads differ in what they hold and not in which
    slots a query sees: one head's positions stand for all, unless votes or choices differ.
    """
    votes = part.log_votes
    shown = part.positions if part.slots is not None or votes is not None else part.positions[:, :1]
    return with_votes(votes, visible(shown, positions), dtype)
