"""What a scorer sees of a chunk of tokens: the logits of its queries over its held entries, later ones too."""

from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

from kvpolicy.attention.attended_slots import AttendedSlots
from kvpolicy.attention.blockwise import entry_logits, query_blocks
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.storage.layer_storage import LayerStorage
from kvpolicy.cache.storage.segment_index import SingleSegment
from kvpolicy.plan.chunk_observers import ChunkObserver
from kvpolicy.stages import QueryLogits
from kvpolicy.stages.slots import indices_of


def observe_complete_chunks(
    storage: LayerStorage,
    batch: QueryBatch,
    earlier: Callable[[], QueryBatch | None],
    num_tokens: Sequence[int],
    observers: Sequence[ChunkObserver],
) -> None:
    """Let scorers see the chunks whose last token is among those of a forward.

    `batch` are the queries of the forward, whose entries `storage` holds, `earlier` gives those before it, as many
    as an incomplete chunk may have; `num_tokens` are the tokens of each row with the forward. Costs logits of one chunk
    at a time.
    """
    before = min(num_tokens) - batch.queries.shape[2]
    for observer in observers:
        chunk = observer.chunk_at(max(before, observer.first, 0))
        while chunk.stop <= max(num_tokens):
            rows = (batch.positions == chunk.stop - 1).any(1)
            known = None
            if batch.padded or chunk.start < max(num_tokens) - batch.queries.shape[2]:
                known = earlier()
            of_chunk = [batch] if known is None else [known, batch]
            _observe(storage, _joined([_queries_at(each, chunk) for each in of_chunk]), chunk, rows, observer)
            chunk = observer.chunk_at(chunk.stop)


def observe_newest_chunk(storage: LayerStorage, queries: QueryBatch, observers: Sequence[ChunkObserver]) -> None:
    """Let scorers see the chunk of each row that is not complete, of which `queries` are those that are known."""
    newest: list[int] = queries.positions.amax(1).tolist()
    for observer in observers:
        chunks = [observer.chunk_at(position) for position in newest]
        incomplete = {chunk for chunk, position in zip(chunks, newest, strict=True) if position < chunk.stop - 1}
        for chunk in sorted(incomplete, key=lambda chunk: chunk.start):
            rows = torch.tensor([own == chunk for own in chunks], device=queries.positions.device)
            _observe(storage, _queries_at(queries, chunk), chunk, rows, observer)


def _queries_at(batch: QueryBatch, chunk: range) -> QueryBatch:
    """The queries at the positions of a chunk, as many as it has tokens; pads (-1) behind those that there are."""
    inside = (batch.positions >= chunk.start) & (batch.positions < chunk.stop)
    found = indices_of(inside[:, None], min(len(chunk), inside.shape[1]))[:, 0]
    rows = torch.arange(found.shape[0], device=found.device)[:, None]
    columns = found.clamp(min=0)
    positions = batch.positions[rows, columns].masked_fill(found < 0, -1)
    queries = batch.queries[rows, :, columns].transpose(1, 2)
    return attrs.evolve(batch, queries=queries, positions=positions, padded=True)


def _joined(batches: Sequence[QueryBatch]) -> QueryBatch:
    """The queries of all of them."""
    if len(batches) == 1:
        return batches[0]
    queries, positions = [each.queries for each in batches], [each.positions for each in batches]
    return attrs.evolve(batches[0], queries=torch.cat(queries, 2), positions=torch.cat(positions, 1))


def _observe(storage: LayerStorage, batch: QueryBatch, chunk: range, rows: Tensor, observer: ChunkObserver) -> None:
    """Show the queries `batch` of a chunk, and write what the scorer remembers in `rows` (bool [B])."""
    if storage.is_block:
        _observe_segments(AttendedSlots(storage, storage.everything), batch, chunk, rows, observer)
        return
    group = batch.queries.shape[1] // storage.heads
    for row in range(storage.rows):
        for head in range(storage.heads):
            part = AttendedSlots(storage, SingleSegment(row, head))
            _observe_segments(part, batch.of_segment(row, head, group), chunk, rows[row : row + 1], observer)


def _observe_segments(
    everything: AttendedSlots, batch: QueryBatch, chunk: range, rows: Tensor, observer: ChunkObserver
) -> None:
    inside = (everything.positions >= chunk.start) & (everything.positions < chunk.stop)
    part = attrs.evolve(everything, slots=indices_of(inside, min(len(chunk), inside.shape[2])))
    if not part.length:
        return
    # [b, k, n, q], which query is that of which entry.
    own = (part.positions[..., None] == batch.positions[:, None, None]) & (part.positions >= 0)[..., None]
    known = own.any(-1)
    shape, device = part.positions.shape, part.positions.device
    before = {name: part.shown_column(column) for name, column in observer.columns.items()}
    state = {name: torch.full(shape, fill, dtype=torch.float32, device=device) for name, fill in observer.fills.items()}
    for block, after in query_blocks(part, batch):
        last = own.shape[3] - after
        asked = own[..., last - block.queries.shape[2] : last].any(2)
        state = {**state, **observer.update(_logits(part, block, chunk, asked[..., None] & known[:, :, None]), state)}
    written = known & rows[:, None, None]
    for name, column in observer.columns.items():
        part.write_shown_column(column, torch.where(written, state[name], before[name]))


def _logits(part: AttendedSlots, block: QueryBatch, chunk: range, seen: Tensor) -> QueryLogits:
    """Of some queries of the chunk; `seen` [b, k, q, n] says which of its entries they see, whichever came first."""
    last = block.positions.where(block.positions < 0, chunk.stop - 1)
    logits = entry_logits(part, attrs.evolve(block, positions=last))
    return QueryLogits(logits.masked_fill(~seen[:, :, None], -torch.inf), part.log_votes, scaling=block.scaling)
