"""Random numbers that are hashes of what they are for, not the next numbers of a generator.

A row draws the same alone and in a batch, on every device, and after a copy of its cache.
"""

import math

import torch
from torch import Tensor

_WORD = 2**32 - 1


def uniform(seed: int, *words: int | Tensor, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), float32 in the shape to which the int64 `words` broadcast.

    Each is a hash of `seed` and of the words.
    """
    return (hashed(seed, *words, device=device) >> 8).float() * 2.0**-24  # 24 bits, which float32 holds exactly


def normal(seed: int, *words: int | Tensor, device: torch.device) -> Tensor:
    """Standard normal numbers, float32 in the shape to which the int64 `words` broadcast; by Box and Muller (1958).

    Computed in float64, so that float32 has the same bits whatever the shape.
    """
    radius = (1 - uniform(seed, *words, 0, device=device).double()).log().mul(-2).sqrt()
    angle = uniform(seed, *words, 1, device=device).double() * (2 * math.pi)
    return (radius * angle.cos()).float()


def sketch(seed: int, layer: int, newest: Tensor, dim: int, rank: int) -> Tensor:
    """Gaussian sketches N(0, 1) / sqrt(rank), float32 [B, 1, dim, rank]: one for all heads of a row.

    `newest` int64 [B] are the rows' newest positions, so that each compression draws anew.
    """
    places = torch.arange(dim * rank, device=newest.device).view(1, 1, dim, rank)
    return normal(seed, layer, newest[:, None, None, None], places, device=newest.device) / math.sqrt(rank)


def hashed(seed: int, *words: int | Tensor, device: torch.device) -> Tensor:
    """32 bits in int64, in the shape to which the int64 `words` broadcast.

    A hash of `seed`, from 0 to 2^32 - 1, and of the lower 32 bits of the words, in this order.
    """
    bits = mixed(torch.full((1,), seed, dtype=torch.int64, device=device))
    for word in words:
        bits = mixed(bits ^ (word & _WORD))
    return bits


def mixed(words: Tensor) -> Tensor:
    """A hash of 32-bit words in an int64 tensor: two rounds of multiply and xor-shift, by Ellis' constants (lowbias32).

    Products overflow 64 bits, and keep their lower 32.
    """
    words = words ^ (words >> 16)
    words = (words * 0x7FEB352D) & _WORD
    words = words ^ (words >> 15)
    words = (words * 0x846CA68B) & _WORD
    return words ^ (words >> 16)
