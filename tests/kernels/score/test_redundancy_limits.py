"""Forgiven similarities of extreme keys, of no segments and of huge storages, and what is refused."""

import pytest
import torch

from kvpolicy_kernels import Column, Segments, UnsupportedInputError
from kvpolicy_kernels.score.redundancy.forgiven_similarity import forgiven_similarity
from tests.kernels.outputs import Guarded
from tests.kernels.references import redundancy as reference
from tests.kernels.scenes import DEVICE, DTYPES, LOUD
from tests.kernels.score.similar_keys import keys_of, place, resembling, threshold_for


@LOUD
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("slot", [0, 17, 99])
def test_a_key_that_is_not_finite_spoils_the_first_slot_of_its_segment_only(slot, wrong, dtype):
    lengths = torch.tensor([[[100, 100]]])
    clean, dirty = (keys_of("clustered", lengths, 16, dtype, seed=8) for _ in range(2))
    dirty.lists("keys")[0][slot, 5] = wrong
    options = {"threshold": threshold_for(clean), "forgive": 1}
    before = forgiven_similarity(clean.segments, clean.columns["keys"], **options)
    after = forgiven_similarity(dirty.segments, dirty.columns["keys"], **options)
    assert torch.equal(after[1], before[1])
    assert after[0, 0].isnan() == (slot > 0)  # the first forgives itself nothing
    assert after[0, 1:].isfinite().all()
    assert not forgiven_similarity(dirty.segments, dirty.columns["keys"], **options, empty_row="none").isnan().any()


@LOUD
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1e15, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_far_from_one(scale, dtype):
    """Keys so small that their norm is lost beside 1e-8 look like nobody; so do those whose norm overflows."""
    found = keys_of("clustered", torch.tensor([[[80]]]), 16, torch.float32, seed=2)
    column = found.columns["keys"]
    keys = (column.storages[0] * scale).to(dtype)
    scaled = Column(torch.tensor([keys.data_ptr()], device=DEVICE), dtype, 16, (keys,))
    sums = forgiven_similarity(found.segments, scaled, threshold=0.5, forgive=1).cpu()[0]
    held = keys[:80].cpu().float()
    directions = held / (held.square().sum(-1, keepdim=True).sqrt() + 1e-8)
    pairs = (directions.double() @ directions.double().T).fill_diagonal_(0)
    exact = reference.forgiven_similarity(pairs, reference.targets(pairs, 0.5, 1, "last"), "slot0")
    torch.testing.assert_close(sums.double(), exact, atol=1e-4, rtol=1e-5)
    assert bool(sums[1:].any()) == (scale == 1e15)


def test_what_the_kernels_cannot_do_is_refused_before_anything_is_written():
    found = keys_of("clustered", torch.tensor([[[20, 30]]]), 16, torch.float32, 0)
    segments, keys = place(found)
    wide = torch.zeros(4, 300, device=DEVICE)
    out = Guarded((2, 30), torch.float32, DEVICE)
    usual = {"threshold": 0.5, "forgive": 1, "out": out.tensor}
    whole = torch.zeros(4, 16, dtype=torch.int32, device=DEVICE)
    for changed in (
        {"forgive": 17},
        {"forgive": -1},
        {"threshold": -0.5},
        {"threshold": float("nan")},
        {"end": "newest"},
        {"empty_row": "slot1"},
        {"out": torch.empty(2, 31, device=DEVICE)},
        {"out": torch.empty(2, 30, dtype=torch.float64, device=DEVICE)},
        {"out": torch.empty(30, 2, device=DEVICE).T},
        {"keys": Column(keys.addresses, torch.float32, 300, (wide,))},
        {"keys": Column(keys.addresses, torch.int32, 16, (whole,))},
        {"keys": Column(keys.addresses.repeat(2), torch.float32, 16, keys.storages)},
        {"segments": Segments(segments.starts, segments.lengths.long(), 1, 1, 2, 30)},
        {"segments": Segments(segments.starts[:1], segments.lengths, 1, 1, 2, 30)},
        {"segments": Segments(segments.starts, segments.lengths, 1, 1, 2, 1 << 23), "out": None},
    ):
        options = {"segments": segments, "keys": keys, **usual, **changed}
        with pytest.raises(UnsupportedInputError):
            forgiven_similarity(options.pop("segments"), options.pop("keys"), **options)
    assert out.tensor.isnan().all()


def test_nothing_at_all():
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    segments = Segments(empty, empty.int(), 1, 0, 2, 5)
    keys = Column(torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.float32, 8, ())
    assert forgiven_similarity(segments, keys, threshold=0.5, forgive=1).shape == (0, 5)


if torch.cuda.is_available():

    def test_storage_beyond_two_to_the_31_elements():
        storage = torch.empty((1 << 31) // 128 + 600, 128, dtype=torch.bfloat16, device=DEVICE)
        keys = resembling("clustered", 500, 128, torch.Generator().manual_seed(1)).to(storage)
        storage[-500:] = keys
        starts = torch.tensor([storage.shape[0] - 500], device=DEVICE)
        far = Segments(starts, torch.tensor([500], dtype=torch.int32, device=DEVICE), 1, 1, 1, 500)
        near = Segments(torch.zeros_like(starts), far.lengths, 1, 1, 1, 500)
        options = {"threshold": 0.5, "forgive": 1}
        columns = [
            Column(torch.tensor([one.data_ptr()], device=DEVICE), one.dtype, 128, (one,)) for one in (storage, keys)
        ]
        assert torch.equal(
            forgiven_similarity(far, columns[0], **options), forgiven_similarity(near, columns[1], **options)
        )
