"""Scorer `key_norm`: keeps small keys."""

from typing import ClassVar

import attrs
from torch import Tensor
from torch.linalg import vector_norm

from kvpolicy.stages import Scorer, Tile, View


@attrs.frozen
class KeyNorm(Scorer):
    """The negative L2 norm of the key (Devoto et al., section 4): keys of low norm get high attention.

    The rotary embedding does not change norms, so keys before and after it have equal scores.
    """

    name: ClassVar[str] = "key_norm"
    reference: ClassVar[str] = "arXiv:2406.11430"
    layers_as_rows: ClassVar[bool] = True

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> Tile:
        from kvpolicy_kernels.score.tiles.key_norm import key_norm

        return Tile(key_norm)

    def score(self, view: View) -> Tensor:
        norms: Tensor = vector_norm(view.keys.float(), dim=-1)
        return -norms
