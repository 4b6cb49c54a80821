"""Codes that are packed into bytes come back, wherever they lie."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy_plugins.codecs.shared.packing import INDEX_BITS, pack, packed_size, unpack, unpack_indices
from tests.property.layers import generators


@given(st.integers(1, 8), st.lists(st.integers(0, 3), max_size=2), st.integers(0, 70), generators)
def test_packed_codes_come_back(bits, shape, count, random):
    codes = torch.randint(2**bits, (*shape, count), dtype=torch.uint8, generator=random)
    packed = pack(codes, bits)
    assert packed.shape == (*shape, packed_size(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes)
    flat = packed.reshape(-1, packed.shape[-1]) if packed.numel() else []
    for row, own in zip(flat, codes.reshape(-1, count) if len(flat) else [], strict=True):
        number = sum(code << place * bits for place, code in enumerate(own.tolist()))
        assert int.from_bytes(bytes(row.tolist()), "little") == number


@given(st.integers(1, 8), generators, st.booleans())
def test_packing_reads_tensors_however_they_lie(bits, random, flipped):
    codes = torch.randint(2**bits, (3, 33, 5), dtype=torch.uint8, generator=random)
    before = codes.clone()
    part = codes.mT[..., 1:] if flipped else codes[1:, :, 2:]
    packed = pack(part, bits)
    assert torch.equal(packed, pack(part.clone(memory_format=torch.contiguous_format), bits))
    inside = torch.full((*packed.shape[:-1], packed.shape[-1] + 3), 255, dtype=torch.uint8)
    inside[..., 3:] = packed
    assert torch.equal(unpack(inside[..., 3:], bits, part.shape[-1]), part)
    assert torch.equal(codes, before)


shapes = st.lists(st.integers(0, 3), max_size=2)


TOGETHER = [(bits, count) for bits in range(1, 7) for count in (1, 2, 4) if bits * count in INDEX_BITS]


@given(st.sampled_from(TOGETHER), shapes, st.integers(0, 9), generators)
def test_neighbouring_codes_are_one_index(of_index, shape, count, random):
    bits, together = of_index
    codes = torch.randint(2**bits, (*shape, count * together), dtype=torch.uint8, generator=random)
    index = unpack_indices(pack(codes, bits), together * bits, count)
    places = 2 ** (bits * torch.arange(together))
    assert torch.equal(index, (codes.unflatten(-1, (count, together)) * places).sum(-1))
    assert index.dtype == torch.int32
