"""Scorer `random`: a number drawn at random for every entry, at every compression anew."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Scorer, View, parameter
from kvpolicy_plugins.shared.limits import SEED

_WORD = 2**32 - 1


@attrs.frozen
class RandomDraw(Scorer):
    """Uniform numbers in [0, 1), independent of keys, values and queries: the null hypothesis of eviction.

    With the prompt protected it is Random Attention: what is said once in the prompt stays, and a reasoning trace
    restates itself. Each draw is a hash of `seed`, layer, head, the newest position of the row and the entry's own, not
    the next number of a generator: a row draws the same alone and in a batch, and after a copy of its cache.
    """

    name: ClassVar[str] = "random"
    reference: ClassVar[str] = "arXiv:2609.03430"

    seed: int = parameter(SEED, 0, help="seed of the draws")

    def in_any_order(self) -> bool:
        return True

    def score(self, view: View) -> Tensor:
        positions = view.positions.long()
        heads = torch.arange(positions.shape[1], device=positions.device)[None, :, None]
        words = mixed(torch.tensor([self.seed], device=positions.device))
        for word in (view.layer, heads, positions.amax((1, 2), keepdim=True), positions):
            words = mixed(words ^ (word & _WORD))
        return (words >> 8).float() * 2.0**-24  # 24 bits, which float32 holds exactly


def mixed(words: Tensor) -> Tensor:
    """A hash of 32-bit words in an int64 tensor: two rounds of multiply and xor-shift, by Ellis' constants (lowbias32).

    Products overflow 64 bits, and keep their lower 32.
    """
    words = words ^ (words >> 16)
    words = (words * 0x7FEB352D) & _WORD
    words = words ^ (words >> 15)
    words = (words * 0x846CA68B) & _WORD
    return words ^ (words >> 16)
