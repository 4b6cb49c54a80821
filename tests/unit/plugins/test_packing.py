"""Codes side by side in bytes."""

import pytest
import torch

from kvpolicy_plugins.codecs.shared.packing import pack, packed_size, unpack


def bytes_of(numbers):
    return torch.tensor(numbers, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0b10000001, 0b1]),
        (2, [1, 2, 3, 0, 2], [0b00111001, 0b10]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0, 5], [0b11010001, 0b01011000, 0b00011111, 0b101]),
        (4, [1, 15, 7], [0xF1, 0x07]),
        (5, [1, 31, 16], [0b11100001, 0b01000011]),
        (6, [1, 63, 32, 5], [0b11000001, 0b00001111, 0b00010110]),
        (7, [127, 1], [0b11111111, 0b0]),
        (8, [255, 3], [255, 3]),
        (4, [], []),
    ],
)
def test_the_lowest_bits_come_first(bits, codes, packed):
    assert pack(bytes_of(codes), bits).tolist() == packed
    assert unpack(bytes_of(packed), bits, len(codes)).tolist() == codes
    assert packed_size(len(codes), bits) == len(packed)


def test_what_is_packed_takes_only_its_own_memory():
    packed = pack(torch.zeros(3, 5, 64, dtype=torch.uint8), 2)
    assert packed.is_contiguous()
    assert packed.untyped_storage().nbytes() == packed.nbytes == 3 * 5 * 16


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_entries_at_all(bits):
    packed = pack(torch.zeros(2, 0, 20, dtype=torch.uint8), bits)
    assert packed.shape == (2, 0, packed_size(20, bits))
    assert unpack(packed, bits, 20).shape == (2, 0, 20)
