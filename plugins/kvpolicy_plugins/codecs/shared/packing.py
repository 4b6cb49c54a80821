"""Bit packing of codes of 1 to 8 bits, and reading them several at a time."""

import functools
import math

import torch
from torch import Tensor

_LARGEST, _TEN, _TWELVE = 8, 10, 2**12 - 1
INDEX_BITS = (*range(1, _LARGEST + 1), _TEN, 12)  # of numbers that neighbouring codes are read as
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` packed codes of `bits`."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Uint8 codes [..., n], each below 2^bits, to uint8 [..., ceil(n · bits / 8)].

    Code i occupies the bits from i · bits on, lowest first; the rest of the last byte is 0. With bits of 1, 2, 4
    or 8 and n · bits divisible by 32, the bytes viewed as int32 are the words of KIVI (arXiv:2402.02750).
    """
    wide = _codes_per_word(bits)
    count = codes.shape[-1]
    words = _words(torch.nn.functional.pad(codes, (0, -count % wide)), wide, wide)
    for lane in reversed(_lane_sizes(wide)):
        low = _mask(lane * bits, 16 * lane, 8 * wide)
        words = (words & low) | (words >> lane * (8 - bits)).bitwise_and_(low << lane * bits)
    lanes = words[..., None].view(torch.uint8)[..., : wide * bits // 8]
    return lanes.flatten(-2)[..., : packed_size(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., ceil(count · bits / 8)] to uint8 codes [..., count]."""
    if not packed.numel():  # words of none may have any stride
        return packed.new_empty((*packed.shape[:-1], count))
    wide = _codes_per_word(bits)
    narrow = wide * bits // 8
    if narrow == 1:
        words = packed.to(_WORDS[wide])
    else:
        words = _words(torch.nn.functional.pad(packed, (0, -packed.shape[-1] % narrow)), narrow, wide)
    for shift, low, high in _steps(bits):
        if bits > 4:  # of two halves of a lane that are put side by side, each overlaps the other's place
            words = (words << shift).bitwise_and_(high).bitwise_or_(words & low)
        else:
            words = (words << shift).bitwise_or_(words).bitwise_and_(high | low)
    codes = words.view(torch.uint8)
    return codes if codes.shape[-1] == count else codes[..., :count]


def unpack_indices(packed: Tensor, bits: int, count: int) -> Tensor:
    """Numbers of `bits`, one of `INDEX_BITS`, as int32 [..., count]: so neighbouring codes are one index of a table."""
    if bits <= _LARGEST:
        return unpack(packed, bits, count).int()
    if bits == _TEN:
        pairs = unpack(packed, bits // 2, 2 * count).view(torch.int16)
        return (pairs >> 3).bitwise_and_(31 << 5).bitwise_or_(pairs & 31).int()
    whole = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 3))
    three = whole.unflatten(-1, (whole.shape[-1] // 3, 3))
    words = three[..., 2].int()
    for byte in (1, 0):
        words = (words << 8).bitwise_or_(three[..., byte])
    halves = torch.empty((*words.shape, 2), dtype=torch.int32, device=words.device)
    torch.bitwise_and(words, _TWELVE, out=halves[..., 0])
    torch.bitwise_right_shift(words, 12, out=halves[..., 1])
    return halves.flatten(-2)[..., :count]


@functools.cache
def _steps(bits: int) -> list[tuple[int, int, int]]:
    """By how much words are shifted to halve their lanes, and the bits of the lower and of the upper halves."""
    wide = _codes_per_word(bits)
    steps = [(lane * (8 - bits), _mask(lane * bits, 16 * lane, 8 * wide), 8 * lane) for lane in _lane_sizes(wide)]
    return [(shift, low, low << up) for shift, low, up in steps]


def _codes_per_word(bits: int) -> int:
    """The fewest codes that fill whole bytes; unpacked, one byte each, they fill one machine word."""
    return 8 // math.gcd(8, bits)


def _lane_sizes(wide: int) -> list[int]:
    """wide/2, wide/4, …, 1: sizes, in codes, of the lanes that a word of `wide` codes is split into."""
    return [wide >> level for level in range(1, wide.bit_length())]


def _mask(ones: int, lane: int, width: int) -> int:
    """`width` bits, of which the lowest `ones` of every `lane` are set."""
    return sum(((1 << ones) - 1) << start for start in range(0, width, lane))


def _words(packed: Tensor, narrow: int, wide: int) -> Tensor:
    """Bytes [..., m · narrow] to words of `wide` bytes each [..., m], every one with the next `narrow` bytes."""
    lanes = packed.unflatten(-1, (packed.shape[-1] // narrow, narrow))
    return torch.nn.functional.pad(lanes, (0, wide - narrow)).contiguous().view(_WORDS[wide]).flatten(-2)
