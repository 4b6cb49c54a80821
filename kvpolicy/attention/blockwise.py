"""Attention block by block over entries that are packed, and over which somebody follows what is attended.

No more than one block of keys or values exists in full precision at any time; what grows with the entries held is the
logits of a block of queries.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from kvpolicy.attention.attended_slots import AttendedSlots
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.plan.forward_observers import ForwardObserver
from kvpolicy.stages import QueryLogits

_LOGITS = 2**19  # that exist at one time, per row: few enough to stay in a CPU's cache


def attend_blockwise(
    part: AttendedSlots,
    batch: QueryBatch,
    observers: Sequence[ForwardObserver],
    dropout: float = 0.0,
    *,
    full: bool = False,
) -> Tensor:
    """Attention [b, H, q, Dv] of queries [b, H, q, D]; observers see the same logits.

    `full` says that no slot is empty.
    """
    if batch.padded and any(observer.count < batch.queries.shape[2] for observer in observers):
        observe_queries(part, batch, observers)  # the newest queries of a row are not the last columns
        observers = ()
    outputs = []
    for block, after in query_blocks(part, batch):
        seen = part.seen_before(after)
        query_logits = QueryLogits(entry_logits(seen, block, full=full), seen.log_votes, sighted=full)
        update_observers(seen, query_logits, after, observers)
        weights = drop(query_logits.probabilities, dropout) if dropout else query_logits.probabilities
        out = seen.weighted_sum(weights.flatten(2, 3))
        outputs.append(out.unflatten(2, (-1, block.queries.shape[2])).flatten(1, 2))
    return torch.cat(outputs, 2).to(batch.queries.dtype)


def observe_queries(part: AttendedSlots, batch: QueryBatch, observers: Sequence[ForwardObserver]) -> None:
    """Let observers see queries whose attention was computed elsewhere."""
    most = max((observer.count for observer in observers), default=0)
    if not most:
        return
    for block, after in query_blocks(part, batch.newest_real(min(most, batch.queries.shape[2]))):
        seen = part.seen_before(after)
        update_observers(seen, QueryLogits(entry_logits(seen, block), seen.log_votes), after, observers)


def update_observers(
    part: AttendedSlots, query_logits: QueryLogits, after: int, observers: Sequence[ForwardObserver]
) -> None:
    """Update the columns of each follower; `after` is how many queries of the forward are newer than these."""
    for observer in observers:
        count = min(observer.count - after, query_logits.logits.shape[3])
        if count < 1:
            continue
        whole = part.slots is None and count == query_logits.logits.shape[3]
        shown = (
            query_logits if whole else QueryLogits(part.spread(query_logits.logits[..., -count:, :]), part.all_votes)
        )
        state = {name: part.column(column) for name, column in observer.columns.items()}
        for name, new in observer.update(shown, state).items():
            part.write_column(observer.columns[name], new)


def query_blocks(part: AttendedSlots, batch: QueryBatch) -> Iterator[tuple[QueryBatch, int]]:
    """Blocks of queries, and how many come after each."""
    count, heads = batch.queries.shape[2], batch.queries.shape[1]
    size = max(1, _LOGITS // max(1, heads * part.length))
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield batch.first(stop).newest(stop - start), count - stop


def entry_logits(part: AttendedSlots, batch: QueryBatch, *, full: bool = False) -> Tensor:
    """[b, k, G, q, T] in at least float32, scaled and without votes, -inf where a query does not see a slot.

    `full` says that no slot is empty, and that the newest q are the queries' own.
    """
    count = batch.queries.shape[2]
    logits: Tensor = part.logits(_grouped(part, batch)).unflatten(2, (-1, count))  # nobody else has it
    if not full:
        return logits.masked_fill_(~visible(part.positions, batch.positions)[:, :, None], -torch.inf)
    if count > 1:
        later = torch.ones(count, count, dtype=torch.bool, device=logits.device).triu_(1)
        logits[..., -count:].masked_fill_(later, -torch.inf)
    return logits


def _grouped(part: AttendedSlots, batch: QueryBatch) -> Tensor:
    """Scaled queries [b, k, G·q, D] in at least float32: those of a group beside each other, so keys are read once."""
    queries = batch.queries.unflatten(1, (part.positions.shape[1], -1)).flatten(2, 3)
    return queries.to(torch.promote_types(queries.dtype, torch.float32)) * batch.scaling


def visible(held: Tensor, positions: Tensor) -> Tensor:
    """Positions [b, k, T] and query positions [b, q] to bool [b, k, q, T]: held, and not later than the query."""
    held = held[:, :, None]
    return (held >= 0) & (held <= positions[:, None, :, None])
