"""Entries at slots, whatever the memory of a tensor is like."""

import pytest
import torch

from kvpolicy.stages.slots import gather, take

ROWS, HEADS, SLOTS, DIM = 2, 3, 7, 4


def _numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


ENTRIES = {
    "side by side": _numbers(ROWS, HEADS, SLOTS, DIM),
    "with room behind": _numbers(ROWS, HEADS, SLOTS + 5, DIM)[:, :, :SLOTS],
    "behind others": _numbers(ROWS, HEADS, SLOTS + 5, DIM)[:, :, 5:],
    "some rows": _numbers(ROWS + 2, HEADS, SLOTS, DIM)[1:3],
    "every other row": _numbers(2 * ROWS, HEADS, SLOTS, DIM)[::2],
    "some heads": _numbers(ROWS, HEADS + 2, SLOTS, DIM)[:, 1:4],
    "parts of vectors": _numbers(ROWS, HEADS, SLOTS, DIM + 3)[..., 1 : DIM + 1],
    "across": _numbers(ROWS, HEADS, DIM, SLOTS).transpose(-1, -2),
    "heads inside": _numbers(ROWS, SLOTS, HEADS, DIM).transpose(1, 2),
    "one for all heads": _numbers(ROWS, 1, SLOTS, DIM).expand(-1, HEADS, -1, -1),
    "one vector": _numbers(ROWS, HEADS, SLOTS, 1),
    "numbers": _numbers(ROWS, HEADS, SLOTS),
    "numbers with room": _numbers(ROWS, HEADS, SLOTS + 5)[..., :SLOTS],
    "groups": _numbers(ROWS, HEADS, SLOTS, 2, DIM),
    "codes": torch.arange(ROWS * HEADS * SLOTS * DIM, dtype=torch.uint8).view(ROWS, HEADS, SLOTS, DIM),
}


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)
def test_the_entry_of_every_slot_is_had(entries, count):
    slots = torch.randint(SLOTS, (ROWS, HEADS, count), generator=torch.Generator().manual_seed(count))
    found, kept = take(entries, slots), slots.masked_fill(slots == 0, -1)
    shown = gather(entries, kept)
    assert found.shape == shown.shape == (ROWS, HEADS, count, *entries.shape[3:])
    for row, head, place in ((b, k, n) for b in range(ROWS) for k in range(HEADS) for n in range(count)):
        slot = int(slots[row, head, place])
        assert torch.equal(found[row, head, place], entries[row, head, slot])
        wanted = entries[row, head, slot] if slot else torch.zeros_like(entries[row, head, slot])
        assert torch.equal(shown[row, head, place], wanted)


@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)
def test_what_is_had_is_a_copy(entries):
    before = entries.clone()
    take(entries, torch.zeros(ROWS, HEADS, 2, dtype=torch.int64)).fill_(9)
    assert torch.equal(entries, before)
