"""Attention over heads that hold different numbers of entries, none of them a pad."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvpolicy.attention.attended_slots import NO_POSITIONS
from kvpolicy.attention.blockwise import grouped_queries
from kvpolicy.attention.sdpa import attend_to, with_votes
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.storage.layer_storage import LayerStorage, PaddedRows
from kvpolicy.cache.storage.segment_index import SingleSegment
from kvpolicy.plan.plan import LOG_VOTES

_COPIED = 2**13  # numbers of the keys of a head: to copy as many takes as long as a call of attention for that head
_UNPACKED = 2**20  # numbers of keys of several heads, or of one, that are unpacked at a time
_MASKED = 2**22  # entries times queries: of so many it may be written which query sees which entry


def are_short(storage: LayerStorage, batch: QueryBatch) -> bool:
    """Whether all entries of a head may exist as numbers at one time, though they are packed, and a mask of them."""
    count, dim = batch.queries.shape[2:]
    return storage.longest * dim <= _UNPACKED and storage.longest * count <= _MASKED


def attend_to_ragged_heads(storage: LayerStorage, batch: QueryBatch, dropout: float) -> Tensor:
    """[B, H, q, Dv] over all entries, the newest of which are those of the queries; heads are plain, or short."""
    return (_over_plain_heads if storage.is_plain else _over_packed_heads)(storage, batch, dropout)


def _over_plain_heads(storage: LayerStorage, batch: QueryBatch, dropout: float) -> Tensor:
    """Nothing is packed.

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
    return attend_to(queries, held.keys, held.values, with_votes(held.log_votes, seen, queries.dtype), options)


def _over_packed_heads(storage: LayerStorage, batch: QueryBatch, dropout: float) -> Tensor:
    """A call for each head, in the bases in which codes are read.

    What is packed of several heads is unpacked at once. Which heads these are has no effect on what is computed.
    """
    queries, options = grouped_queries(batch, storage.heads), {"scale": batch.scaling, "dropout_p": dropout}
    queries = storage.keys.form.queries_to_basis(queries).unflatten(2, (-1, batch.queries.shape[2]))
    outputs = []
    for segments in _few_numbers(storage, queries.shape[-1]):
        positions = [storage.positions(at.row, at.head) for at in segments]
        keys, values = (
            states.segments_in_basis(segments, positions, queries.dtype) for states in (storage.keys, storage.values)
        )
        for at, own_keys, own_values in zip(segments, keys, values, strict=True):
            own = queries[at.row, at.head][None]
            outputs.append(_of_one_head(storage, at, own, own_keys, own_values, options))
    output: Tensor = torch.cat(outputs).flatten(1, 2).unflatten(0, (-1, storage.heads))
    output = storage.values.form.from_basis(output).unflatten(2, (-1, batch.queries.shape[2])).flatten(1, 2)
    return output.to(batch.queries.dtype)


def _few_numbers(storage: LayerStorage, dim: int) -> Iterator[list[SingleSegment]]:
    """All segments, in order; those that are unpacked at once have at most `_UNPACKED` numbers, unless it is one."""
    taken: list[SingleSegment] = []
    numbers = 0
    for row, lengths in enumerate(storage.lengths):
        for head, length in enumerate(lengths):
            if taken and numbers + length * dim > _UNPACKED:
                yield taken
                taken, numbers = [], 0
            taken.append(SingleSegment(row, head))
            numbers += length * dim
    yield taken


def _one_by_one(storage: LayerStorage, row: int, queries: Tensor, options: dict[str, Any]) -> Tensor:
    """A call for each head of a row, [1, H, q, D]."""
    outputs = []
    for head, (length, own) in enumerate(zip(storage.lengths[row], queries.chunk(storage.heads, 1), strict=True)):
        at = SingleSegment(row, head)
        keys, values = (states.read(at, 0, length, NO_POSITIONS) for states in (storage.keys, storage.values))
        outputs.append(_of_one_head(storage, at, own, keys, values, options))
    return torch.cat(outputs, 1)


def _of_one_head(
    storage: LayerStorage, at: SingleSegment, queries: Tensor, keys: Tensor, values: Tensor, options: dict[str, Any]
) -> Tensor:
    """Queries [1, G, q, D] over all entries [1, 1, T, D] of a head, the newest of which are those of the queries."""
    count, length, seen = queries.shape[2], keys.shape[2], None
    if count > 1:
        seen = (torch.arange(length, device=keys.device) < length - _newer(count, keys.device))[None, None]
    votes = storage.column(LOG_VOTES, at) if LOG_VOTES in storage.columns else None
    return attend_to(queries, keys, values, with_votes(votes, seen, queries.dtype), options)


def _newer(count: int, device: torch.device) -> Tensor:
    """How many of q tokens come behind each, [q, 1]."""
    return torch.arange(count - 1, -1, -1, device=device)[:, None]
