"""What cannot be moved is refused, and storages of more than two billion elements are compacted."""

import pytest
import torch

from kvpolicy_kernels import Column, Segments, UnsupportedInputError
from kvpolicy_kernels.compact.compact import compact
from tests.kernels.scenes import DEVICE, scene


def refused():
    """Arguments that must be refused, by what is wrong with them."""
    found = scene(torch.tensor([[[20, 10]]]), 8, torch.float32)
    segments, keys, positions = found.segments, found.columns["keys"], found.columns["positions"]
    kept = torch.arange(4, dtype=torch.int32, device=DEVICE).expand(2, 4).contiguous()
    good = {"segments": segments, "kept": kept, "columns": [keys], "ordered": True, "positions": positions}
    shifted = keys.storages[0].flatten()[1:]
    misplaced = Column(torch.tensor([shifted.data_ptr()], device=DEVICE), torch.float32, 8, (shifted,))
    wide = Column(keys.addresses, torch.float32, 1 << 14, keys.storages)
    return [
        {**good, "kept": kept.long()},
        {**good, "kept": kept[:1]},
        {**good, "kept": kept.t().contiguous().t()},
        {**good, "columns": [misplaced]},
        {**good, "columns": [wide]},
        {**good, "columns": [Column(keys.addresses.repeat(2), torch.float32, 8, keys.storages)]},
        {**good, "positions": keys},
        {**good, "out": segments.lengths},
        {**good, "out": torch.zeros(2, dtype=torch.int64, device=DEVICE)},
        {**good, "out": torch.zeros(3, dtype=torch.int32, device=DEVICE)},
        {**good, "segments": Segments(segments.starts.to("meta"), segments.lengths, 1, 1, 2, 20)},
    ]


@pytest.mark.parametrize("case", range(11))
def test_what_cannot_be_moved_is_refused_before_anything_has_changed(case):
    arguments = refused()[case]
    before = [one.clone() for column in arguments["columns"] for one in column.storages]
    with pytest.raises(UnsupportedInputError):
        compact(**arguments)
    after = [one for column in arguments["columns"] for one in column.storages]
    assert all(torch.equal(one.nan_to_num(7), other.nan_to_num(7)) for one, other in zip(before, after, strict=True))


if torch.cuda.is_available():

    @pytest.mark.parametrize("ordered", [True, False])
    def test_more_than_two_billion_elements(ordered):
        slots, width = 2**24 + 400, 128
        storage = torch.zeros(slots, width, dtype=torch.int8, device=DEVICE)
        storage[-300:] = torch.randint(1, 100, (300, width), device=DEVICE).to(torch.int8)
        rows = storage[-300:].clone()
        column = Column(torch.tensor([storage.data_ptr()], device=DEVICE), torch.int8, width, (storage,))
        starts = torch.tensor([slots - 300], device=DEVICE)
        segments = Segments(starts, torch.tensor([300], dtype=torch.int32, device=DEVICE), 1, 1, 1, 300)
        kept = torch.arange(100, 300, dtype=torch.int32, device=DEVICE)[None]
        compact(segments, kept, [column], ordered=ordered)
        moved = rows[100:] if ordered else torch.cat([rows[200:], rows[100:200]])
        assert torch.equal(storage[-300:-100], moved)
        assert not storage[:-300].any()
