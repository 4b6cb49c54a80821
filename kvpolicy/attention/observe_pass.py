"""What a scorer sees of a pass: the logits of its queries over held entries, and what its own entries weigh."""

import torch
from torch import Tensor

from kvpolicy.attention.attended_slots import AttendedSlots
from kvpolicy.attention.blockwise import entry_logits, query_blocks, slot_blocks, visible
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.request.pass_batch import PassBatch
from kvpolicy.cache.storage.layer_storage import LayerStorage
from kvpolicy.cache.storage.segment_index import SingleSegment
from kvpolicy.plan.passes import PassObserver
from kvpolicy.stages import QueryLogits, output_norms


def observe_pass(
    storage: LayerStorage,
    batch: QueryBatch,
    own: Tensor,
    passes: PassBatch,
    observer: PassObserver,
    projection: Tensor | None = None,
) -> None:
    """Let a scorer see the queries of a pass, and write what it remembers of them to the columns of its state.

    `storage` holds the entries that are shown, and no longer those of the pass, whose keys are `own` [B, K, m, D];
    `projection` is the weight [H, Dv, C] that follows the attention, where values behind it are shown.
    Rows without a pass keep their state. Costs logits of a block of queries at a time.
    """
    if storage.is_block:
        everything = AttendedSlots(storage, storage.everything)
        slots = passes.slots(everything.positions)
        _observe(AttendedSlots(storage, storage.everything, slots), batch, own, passes.reads, observer, projection)
        return
    group = batch.queries.shape[1] // storage.heads
    for row in range(storage.rows):
        of_row = passes.of_row(row)
        for head in range(storage.heads):
            slots = of_row.slots(storage.positions(row, head)[None, None])
            part = AttendedSlots(storage, SingleSegment(row, head), slots)
            keys = own[row : row + 1, head : head + 1]
            weight = None if projection is None else projection[head * group : (head + 1) * group]
            _observe(part, batch.of_segment(row, head, group), keys, of_row.reads, observer, weight)


def _observe(
    part: AttendedSlots,
    batch: QueryBatch,
    own: Tensor,
    reads: Tensor,
    observer: PassObserver,
    projection: Tensor | None,
) -> None:
    if not part.length:
        return
    norms = None if projection is None else _output_norms(part, batch, projection)
    for block, _ in query_blocks(part, batch):
        seen = QueryLogits(
            entry_logits(part, block),
            part.log_votes,
            _weight_of(own, batch.positions, block),
            output_norms=norms,
            hidden_norms=block.hidden_norms,
            scaling=batch.scaling,
        )
        state = {name: part.shown_column(column) for name, column in observer.columns.items()}
        for name, new in observer.update(seen, state).items():
            kept = torch.where(reads[:, None, None], new.to(state[name].dtype), state[name])
            part.write_shown_column(observer.columns[name], kept)


def _output_norms(part: AttendedSlots, batch: QueryBatch, projection: Tensor) -> Tensor:
    """Of the values that are shown, the same for all queries of a pass, [b, k, G, T]."""
    return torch.cat(
        [output_norms(part.values(block), projection) for block in slot_blocks(part, batch, part.storage.values)], -1
    )


def _weight_of(own: Tensor, positions: Tensor, block: QueryBatch) -> Tensor:
    """Log of the sum of exp(logit) over the entries of a pass up to each query's own, [b, k, G, q]; -inf for pads."""
    heads, count = own.shape[1], block.queries.shape[2]
    queries = block.queries.unflatten(1, (heads, -1)).flatten(2, 3)
    queries = queries.to(torch.promote_types(queries.dtype, torch.float32)) * block.scaling
    logits = (queries @ own.to(queries.dtype).transpose(-1, -2)).unflatten(2, (-1, count))
    hidden = ~visible(positions[:, None], block.positions)[:, :, None]
    weight: Tensor = logits.masked_fill(hidden, -torch.inf).logsumexp(-1)
    return weight
