"""Attention block by block over entries that are packed, and over which somebody follows what is attended.

No more than one block of keys or values exists in full precision at any time; what grows with the entries held is the
logits of a block of queries.
"""

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from kvpolicy.attention.attended_slots import Part
from kvpolicy.cache.query_batch import Asked
from kvpolicy.plan.forward_observers import Follower
from kvpolicy.stages import Glimpse

_LOGITS = 2**20  # that exist at one time, per row: few enough to stay in a CPU's cache


def attend_blockwise(part: Part, asked: Asked, followers: Sequence[Follower], dropout: float = 0.0) -> Tensor:
    """Attention [b, H, q, Dv] of queries [b, H, q, D]; followers see the same logits."""
    if asked.padded and any(one.count < asked.queries.shape[2] for one in followers):
        watch(part, asked, followers)  # the newest queries of a row are not the last columns
        followers = ()
    outputs = []
    for block, after in _query_blocks(part, asked):
        seen = part.seen_before(after)
        glimpse = Glimpse(_logits(seen, block), seen.log_votes)
        follow(seen, glimpse, after, followers)
        weights = drop(glimpse.probabilities, dropout) if dropout else glimpse.probabilities
        out = reduce(torch.add, (_weighted(seen, weights, slots) for slots in seen.blocks()))
        outputs.append(out.unflatten(2, (-1, block.queries.shape[2])).flatten(1, 2))
    return torch.cat(outputs, 2).to(asked.queries.dtype)


def watch(part: Part, asked: Asked, followers: Sequence[Follower]) -> None:
    """Let followers see queries whose attention was computed elsewhere."""
    most = max((one.count for one in followers), default=0)
    if not most:
        return
    for block, after in _query_blocks(part, asked.newest_real(min(most, asked.queries.shape[2]))):
        seen = part.seen_before(after)
        follow(seen, Glimpse(_logits(seen, block), seen.log_votes), after, followers)


def follow(part: Part, glimpse: Glimpse, after: int, followers: Sequence[Follower]) -> None:
    """Update the columns of each follower; `after` is how many queries of the forward are newer than these."""
    for one in followers:
        count = min(one.count - after, glimpse.logits.shape[3])
        if count < 1:
            continue
        whole = part.slots is None and count == glimpse.logits.shape[3]
        shown = glimpse if whole else Glimpse(part.spread(glimpse.logits[..., -count:, :]), part.all_votes)
        state = {name: part.column(column) for name, column in one.columns.items()}
        for name, new in one.update(shown, state).items():
            state[name].copy_(new)


def _query_blocks(part: Part, asked: Asked) -> Iterator[tuple[Asked, int]]:
    """Blocks of queries, and how many come after each."""
    count, heads = asked.queries.shape[2], asked.queries.shape[1]
    size = max(1, _LOGITS // max(1, heads * part.length))
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield asked.first(stop).newest(stop - start), count - stop


def _logits(part: Part, asked: Asked) -> Tensor:
    """[b, k, G, q, T] in at least float32, scaled and without votes, -inf where a query does not see a slot."""
    heads, count = part.positions.shape[1], asked.queries.shape[2]
    queries = asked.queries.unflatten(1, (heads, -1)).flatten(2, 3)  # [b, k, G·q, D]: keys are read once
    queries = queries.to(torch.promote_types(queries.dtype, torch.float32)) * asked.scaling
    logits = torch.cat([queries @ part.keys(slots).to(queries.dtype).transpose(-1, -2) for slots in part.blocks()], -1)
    hidden = ~visible(part.positions, asked.positions)[:, :, None]
    grouped: Tensor = logits.unflatten(2, (-1, count))
    return grouped.masked_fill_(hidden, -torch.inf)  # nobody else has it


def _weighted(part: Part, weights: Tensor, slots: slice) -> Tensor:
    """What the slots of one block add to the output, [b, k, G·q, Dv]."""
    return weights[..., slots].flatten(2, 3) @ part.values(slots).to(weights.dtype)


def visible(held: Tensor, positions: Tensor) -> Tensor:
    """Positions [b, k, T] and query positions [b, q] to bool [b, k, q, T]: held, and not later than the query."""
    held = held[:, :, None]
    return (held >= 0) & (held <= positions[:, None, :, None])
