"""Which slots are kept, and what storages should hold after compaction, moved entry by entry."""

import torch

from kvpolicy_kernels.compact.compact import compact
from tests.kernels.outputs import Guarded
from tests.kernels.scenes import DEVICE

EIGHT = torch.float8_e4m3fn
EXTRA = {"votes": ((), torch.float32), "attention": ((3,), torch.float32), "flags": ((), torch.bool)}


def random_kept(lengths, share, random):
    """Ascending slots of every segment, about that share of them; [P, N] int32."""
    rows = [(torch.rand(length, generator=random) < share).nonzero().flatten() for length in lengths.tolist()]
    width = max(map(len, rows))
    padded = [torch.cat([row, row.new_full((width - len(row),), -1)]) for row in rows]
    return torch.stack(padded).to(torch.int32).to(DEVICE)


def bits(tensor):
    """As integers [slots, bytes], so that NaN equals itself."""
    return tensor.reshape(len(tensor), -1).contiguous().view(torch.uint8).clone()


def snapshot(columns):
    return {name: [bits(one) for one in column.storages] for name, column in columns.items()}


def moves_of(slots, ordered):
    """(from, to) of every kept entry of a segment."""
    if ordered:
        return list(enumerate(slots))
    count = len(slots)
    holes = [slot for slot in range(count) if slot not in slots]
    movers = [slot for slot in slots if slot >= count]
    return [(slot, slot) for slot in slots if slot < count] + list(zip(holes, movers, strict=True))


def expected(before, segments, kept, ordered):
    """All storages after compaction, moved entry by entry; and how many entries have changed their slot."""
    after = {name: [one.clone() for one in storages] for name, storages in before.items()}
    moved = 0
    for place, (start, length) in enumerate(zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True)):
        slots = [slot for slot in kept[place].tolist() if slot >= 0]
        layer = place // segments.per_layer
        moves = moves_of(slots, ordered)
        moved += sum(one != other for one, other in moves)
        for name, storages in after.items():
            for target, source in moves:
                storages[layer][start + target] = before[name][layer][start + source]
            if name == "positions":
                storages[layer][start + len(slots) : start + length] = 255  # the bytes of -1
    return after, moved


def check(found, kept, *, ordered):
    columns, segments = found.columns, found.segments
    before = snapshot(columns)
    after, moved = expected(before, segments, kept, ordered)
    out = Guarded((segments.count,), torch.int32, DEVICE)
    lengths = segments.lengths.clone()
    rest = [column for name, column in columns.items() if name != "positions"]
    compact(segments, kept, rest, ordered=ordered, positions=columns["positions"], out=out.tensor)
    out.check()
    assert out.tensor.tolist() == (kept >= 0).sum(-1).tolist()
    assert torch.equal(segments.lengths, lengths)
    for name, storages in snapshot(columns).items():
        for layer, storage in enumerate(storages):
            wrong = (storage != after[name][layer]).any(-1).nonzero().flatten().tolist()
            assert not wrong, f"{name} of layer {layer} differs in slots {wrong[:5]}"
    return moved
