"""Scorer `random`: a number drawn at random for every entry, at every compression anew."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Scorer, View, parameter
from kvpolicy_plugins.shared.limits import SEED
from kvpolicy_plugins.shared.seeded_draws import uniform


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
        newest = positions.amax((1, 2), keepdim=True)
        return uniform(self.seed, view.layer, heads, newest, positions, device=positions.device)
