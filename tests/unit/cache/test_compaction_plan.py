"""Which holes are filled with what, for one layer and for several at once."""

import pytest
import torch

from kvpolicy.cache.compaction.compaction_plan import filling_of, filling_together

HELD = 8


def _filled(kept, filling):
    """The slots whose entries stand in the first ones, of one head."""
    stand = list(range(HELD))
    holes, last = filling.tolist()
    for hole, source in zip(holes, last, strict=True):
        stand[hole] = source
    return stand[: sum(slot >= 0 for slot in kept)]


@pytest.mark.parametrize("spare", [0, 1, 3])
def test_what_stays_fills_the_first_slots_and_little_moves(spare):
    random = torch.Generator().manual_seed(spare)
    for stay in range(1, HELD + 1):
        kept = torch.randperm(HELD, generator=random)[:stay].sort().values
        padded = torch.cat([kept, kept.new_full((2,), -1)])
        filling = filling_of(padded, HELD - stay + spare)
        stand = _filled(padded.tolist(), filling)
        assert sorted(stand) == kept.tolist()
        assert all(slot in (place, *range(stay, HELD)) for place, slot in enumerate(stand))


def test_a_head_of_which_nothing_stays_fills_nothing():
    kept = torch.tensor([[1, 2], [-1, -1]])
    assert filling_of(kept, 2)[:, 1].tolist() == [[-1, -1], [-1, -1]]
    assert filling_of(kept[:, :0], 2).shape == (2, 2, 0)


def test_layers_are_planned_together_as_each_by_itself():
    layers = [torch.tensor([[[0, 2, 3], [0, 1, 2]]]), torch.tensor([[[1, 2, 3], [0, 1, 3]]])]
    together = filling_together(layers, 1)
    for kept, filling in zip(layers, together, strict=True):
        assert torch.equal(filling, filling_of(kept, 1))
    assert filling_together([layers[0], layers[1][..., :2]], 1) == [None, None]
