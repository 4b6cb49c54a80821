"""Keep what is unlike the rest: KeyDiff (Park et al., arXiv:2504.15364)."""

from typing import ClassVar

import attrs
from torch import Tensor
from torch.nn.functional import normalize

from kvpolicy.stages import Number, Scorer, Tile, View, parameter


@attrs.frozen
class KeyDiversity(Scorer):
    """Minus the cosine between a key and the mean direction of all held keys of its head, section 3 of the paper."""

    name: ClassVar[str] = "key_diversity"
    reference: ClassVar[str] = "arXiv:2504.15364"

    sharpness: float = parameter(Number(above=0), 1.0, help="exponent of the distance; above 1 favours outliers")

    def score(self, view: View) -> Tensor:
        """[B, K, T], larger = less like the others."""
        keys = normalize(view.keys.float(), dim=-1).masked_fill(~view.valid[..., None], 0)
        mean = normalize(keys.sum(2, keepdim=True), dim=-1)
        distance = 1 - (keys * mean).sum(-1)
        return distance.clamp(min=0) ** self.sharpness

    def in_any_order(self) -> bool:
        """Yes: no neighbour and no age is looked at."""
        return True

    def tile(self) -> Tile:
        """The same on a GPU; its module needs Triton, without which `score` runs."""
        from example_kvpolicy.tiles import directions, distance

        return Tile(distance, arguments=(self.sharpness,), statistic=directions)
