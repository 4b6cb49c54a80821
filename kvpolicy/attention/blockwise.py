"""Attention block by block over entries that are packed, and over which somebody follows what is attended.

Keys and values are read in the basis in which their format holds codes: queries are taken to it, outputs are taken back
from it, entries are not. No more than one block of them exists as numbers at any time.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from kvpolicy.attention.attended_slots import AttendedSlots
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.storage.layer_storage import KVReader
from kvpolicy.plan.forward_observers import ForwardObserver
from kvpolicy.stages import QueryLogits

# Numbers of keys of a block of slots, and logits of these, that exist at one time: few enough for a CPU's cache.
_NUMBERS = {"cpu": 2**19}
_ELSEWHERE = 2**26
_LEAST = 64  # slots of a block
_JOINED = 2**18  # numbers that are put together where some are packed and some not: two products would take longer
_LOGITS = 2**20  # of all slots, that exist at one time where they are looked at together, per row


def attend_blockwise(
    part: AttendedSlots,
    batch: QueryBatch,
    observers: Sequence[ForwardObserver],
    dropout: float = 0.0,
    *,
    full: bool = False,
) -> Tensor:
    """Attention [b, H, q, Dv] of queries [b, H, q, D]; observers see the same logits.

    `full` says that no slot is empty, and that the newest q are those of the queries.
    """
    blocks = list(query_blocks(part, batch))
    if len(blocks) > 1 and not observers and not dropout:
        return _attend_in_one_pass(part, batch, full=full)
    if batch.padded and any(observer.count < batch.queries.shape[2] for observer in observers):
        observe_queries(part, batch, observers)  # the newest queries of a row are not the last columns
        observers = ()
    outputs = []
    for block, after in blocks:
        seen = part.seen_before(after)
        query_logits = QueryLogits(
            entry_logits(seen, block, full=full), seen.log_votes, sighted=full, scaling=batch.scaling
        )
        update_observers(seen, query_logits, after, observers)
        weights = drop(query_logits.probabilities, dropout) if dropout else query_logits.probabilities
        out = _weighted_sum(seen, weights.flatten(2, 3), slot_blocks(seen, block, seen.storage.values))
        outputs.append(out.unflatten(2, (-1, block.queries.shape[2])).flatten(1, 2))
    return (torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]).to(batch.queries.dtype)


def _attend_in_one_pass(part: AttendedSlots, batch: QueryBatch, *, full: bool) -> Tensor:
    """For many queries, so that each entry is read once.

    With a running maximum and a running sum of exponentials, as FlashAttention (arXiv:2205.14135, algorithm 1).
    """
    queries = part.queries_to_basis(grouped_queries(batch, part.heads) * batch.scaling)
    votes, positions, count = part.log_votes, part.positions, batch.queries.shape[2]
    best = queries.new_full((*queries.shape[:3], 1), torch.finfo(queries.dtype).min)
    total, out = torch.zeros_like(best), torch.zeros_like(queries)
    for block in slot_blocks(part, batch, part.storage.keys, part.storage.values):
        logits = _product(queries, part.keys_in_basis(block, queries.dtype).transpose(-1, -2))
        if votes is not None:
            logits += votes[:, :, None, block]
        if not full:
            hidden = ~visible(positions[:, :, block], batch.positions)
            logits.unflatten(2, (-1, count)).masked_fill_(hidden[:, :, None], -torch.inf)
        elif count > 1:
            _hide_later(logits.unflatten(2, (-1, count)), block.stop + count - positions.shape[2])
        before, best = best, torch.maximum(best, logits.amax(-1, keepdim=True))
        weights, shrinks = logits.sub_(best).exp_(), (before - best).exp_()
        total = total * shrinks + weights.sum(-1, keepdim=True)
        out = out * shrinks + _product(weights, part.values_in_basis(block, queries.dtype))
    out /= total.clamp(min=torch.finfo(total.dtype).tiny)  # 0 where a query sees nothing
    outputs: Tensor = part.from_basis(out).unflatten(2, (-1, count)).flatten(1, 2).to(batch.queries.dtype)
    return outputs


def _hide_later(logits: Tensor, new: int) -> None:
    """Hide from each of q queries, logits [..., q, n], the tokens behind its own; the last slot is of token new - 1."""
    count, size = logits.shape[-2:]
    if new > 0:
        tokens = torch.arange(max(0, new - size), new, device=logits.device)
        later = tokens > torch.arange(count, device=logits.device)[:, None]
        logits[..., size - len(tokens) :].masked_fill_(later, -torch.inf)


def slot_blocks(part: AttendedSlots, batch: QueryBatch, *states: KVReader) -> Iterator[slice]:
    """Slots of keys, of values, or of both, to be read at one time: few numbers of them and of logits, but enough."""
    rows, heads, count, dim = batch.queries.shape
    if part.slots is None and is_joined(part.heads, part.length, batch):
        return iter((slice(0, part.length),))
    numbers = _NUMBERS.get(batch.queries.device.type, _ELSEWHERE)
    return part.blocks(max(_LEAST, numbers // (rows * max(heads * count, part.heads * dim))), *states)


def is_joined(heads: int, length: int, batch: QueryBatch) -> bool:
    """Whether `length` slots of so many KV heads are so few that they are read at once, whether packed or not."""
    rows, query_heads, count, dim = batch.queries.shape
    return rows * length * max(query_heads * count, heads * dim) <= _JOINED


def observe_queries(part: AttendedSlots, batch: QueryBatch, observers: Sequence[ForwardObserver]) -> None:
    """Let observers see queries whose attention was computed elsewhere."""
    most = max((observer.count for observer in observers), default=0)
    if not most:
        return
    for block, after in query_blocks(part, batch.newest_real(min(most, batch.queries.shape[2]))):
        seen = part.seen_before(after)
        query_logits = QueryLogits(entry_logits(seen, block), seen.log_votes, scaling=batch.scaling)
        update_observers(seen, query_logits, after, observers)


def update_observers(
    part: AttendedSlots, query_logits: QueryLogits, after: int, observers: Sequence[ForwardObserver]
) -> None:
    """Update the columns of each follower; `after` is how many queries of the forward are newer than these."""
    for observer in observers:
        count = min(observer.count - after, query_logits.logits.shape[3])
        if count < 1:
            continue
        whole = part.slots is None and count == query_logits.logits.shape[3]
        shown = query_logits
        if not whole:
            logits = part.spread(query_logits.logits[..., -count:, :])
            shown = QueryLogits(logits, part.all_votes, scaling=query_logits.scaling)
        state = {name: part.column(column) for name, column in observer.columns.items()}
        for name, new in observer.update(shown, state).items():
            part.write_column(observer.columns[name], new)


def query_blocks(part: AttendedSlots, batch: QueryBatch) -> Iterator[tuple[QueryBatch, int]]:
    """Blocks of queries, and how many come after each."""
    count, heads = batch.queries.shape[2], batch.queries.shape[1]
    size = max(1, _LOGITS // max(1, heads * part.length))
    if size >= count:
        yield batch, 0
        return
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield batch.first(stop).newest(stop - start), count - stop


def entry_logits(part: AttendedSlots, batch: QueryBatch, *, full: bool = False) -> Tensor:
    """[b, k, G, q, T] in at least float32, scaled and without votes, -inf where a query does not see a slot.

    `full` says that no slot is empty, and that the newest q are those of the queries.
    """
    queries, count = part.queries_to_basis(grouped_queries(batch, part.heads) * batch.scaling), batch.queries.shape[2]
    blocks = slot_blocks(part, batch, part.storage.keys)
    parts = [_product(queries, part.keys_in_basis(block, queries.dtype).transpose(-1, -2)) for block in blocks]
    logits = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    grouped: Tensor = logits.unflatten(2, (-1, count))  # nobody else has it
    if not full:
        grouped.masked_fill_(~visible(part.positions, batch.positions)[:, :, None], -torch.inf)
    elif count > 1:
        _hide_later(grouped, count)
    return grouped


def _weighted_sum(part: AttendedSlots, weights: Tensor, blocks: Iterator[slice]) -> Tensor:
    """The values weighted by [b, k, n, T], in the basis of the model: [b, k, n, Dv]."""
    length = weights.shape[-1]
    sums = (
        _product(
            weights if block == slice(0, length) else weights[..., block], part.values_in_basis(block, weights.dtype)
        )
        for block in blocks
    )
    total: Tensor = reduce(add, sums)
    return part.from_basis(total)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of [b, k, ...] by the one operator that matmul, which first expands both, ends in."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).view(*left.shape[:3], right.shape[3])


def grouped_queries(batch: QueryBatch, heads: int) -> Tensor:
    """Queries [b, k, G·q, D] in at least float32: those of a group beside each other, so that keys are read once."""
    rows, _, _, dim = batch.queries.shape
    queries = batch.queries.reshape(rows, heads, -1, dim)
    return queries if queries.dtype == torch.float64 else queries.float()


def visible(held: Tensor, positions: Tensor) -> Tensor:
    """Positions [b, k, T] and query positions [b, q] to bool [b, k, q, T]: held, and not later than the query."""
    held = held[:, :, None]
    return (held >= 0) & (held <= positions[:, None, :, None])
