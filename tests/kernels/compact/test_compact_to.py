"""What is kept is copied into other storages, bit for bit; the source stays as it is."""

import pytest
import torch

from kvpolicy_kernels import UnsupportedInputError
from kvpolicy_kernels.compact.compact import compact_to, traffic_to
from tests.kernels.compact.compacting import EIGHT, EXTRA, random_kept, snapshot
from tests.kernels.counting import counted
from tests.kernels.outputs import Guarded
from tests.kernels.scenes import DEVICE, scene


@pytest.mark.parametrize("length", [1, 31, 64, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, EIGHT])
def test_copies_go_from_dense_to_ragged_storages(length, dtype):
    lengths = torch.tensor([[[length, 0], [3, length]], [[length // 2, 1], [length, length]]])
    found = scene(lengths, 20, dtype, capacity=length + 2 if length > 3 else 5, extra=EXTRA, seed=length)
    kept = random_kept(lengths.flatten(), 0.5, torch.Generator().manual_seed(length))
    room = (kept >= 0).sum(-1).view(lengths.shape) + 2
    onto = scene(room, 20, dtype, extra=EXTRA, seed=length + 1)
    before, after = snapshot(found.columns), snapshot(onto.columns)
    for place, slots in enumerate(kept.tolist()):
        start, target = int(found.segments.starts[place]), int(onto.segments.starts[place])
        for name, storages in after.items():
            layer = place // 4
            for index, slot in enumerate(slots):
                if slot >= 0:
                    storages[layer][target + index] = before[name][layer][start + slot]
    out = Guarded((8,), torch.int32, DEVICE)
    names = list(found.columns)
    source, target = ([one.columns[name] for name in names] for one in (found, onto))
    compact_to(found.segments, kept, source, onto.segments, target, out=out.tensor)
    out.check()
    assert out.tensor.tolist() == (kept >= 0).sum(-1).tolist()
    for name, storages in snapshot(onto.columns).items():
        assert all(map(torch.equal, storages, after[name])), name
    for name, storages in snapshot(found.columns).items():
        assert all(map(torch.equal, storages, before[name])), f"{name} of the source has changed"


def test_traffic_of_copies():
    lengths = torch.tensor([[[70, 33]]])
    found, onto = (scene(lengths, 64, torch.bfloat16, extra=EXTRA) for _ in range(2))
    kept = random_kept(lengths.flatten(), 0.6, torch.Generator().manual_seed(1))
    names, out = list(found.columns), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    source, target = ([one.columns[name] for name in names] for one in (found, onto))
    reads = {**{name: column.storages for name, column in found.columns.items()}, "kept": kept}
    writes = {**{name: column.storages for name, column in onto.columns.items()}, "lengths": out}
    with counted(reads) as read, counted(writes) as written:
        compact_to(found.segments, kept, source, onto.segments, target, out=out)
    said = traffic_to(found.segments, found.columns, kept.shape[1], kept=int((kept >= 0).sum()))
    assert (read.read, written.written) == (said.read, said.written)
    assert not read.written
    assert not written.read


def test_copies_that_cannot_be_made_are_refused():
    found, onto = (scene(torch.tensor([[[20, 10]]]), 8, torch.float32) for _ in range(2))
    other = scene(torch.tensor([[[20, 10]]]), 8, torch.float16)
    rows = scene(torch.tensor([[[20]], [[10]]]), 8, torch.float32)
    kept = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    for target in (found, other, rows):
        with pytest.raises(UnsupportedInputError):
            compact_to(found.segments, kept, [found.columns["keys"]], target.segments, [target.columns["keys"]])
    compact_to(found.segments, kept, [found.columns["keys"]], onto.segments, [onto.columns["keys"]])
