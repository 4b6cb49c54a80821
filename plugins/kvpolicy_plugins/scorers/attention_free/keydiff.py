"""Scorer `keydiff`: keeps keys that point elsewhere than the others."""

from typing import ClassVar

import attrs
from torch import Tensor
from torch.nn.functional import normalize

from kvpolicy.stages import Scorer, Tile, View


@attrs.frozen
class KeyDiff(Scorer):
    """Minus the cosine of a key and the anchor, the mean direction of all keys of its head, KeyDiff (section 3).

    1. anchor = mean over the held entries of k / |k|, [B, K, D];
    2. score = -cos(k, anchor), [B, K, T] float32; 0 where the key or the anchor is 0.

    Keys are as cached, after the rotary embedding. The paper reads a prompt in blocks, and compares each block with
    what is left of those before: here this is chunked prefill. A prompt of one chunk has one anchor, as in kvpress.
    """

    name: ClassVar[str] = "keydiff"
    reference: ClassVar[str] = "arXiv:2504.15364"

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> Tile:
        from kvpolicy_kernels.score.tiles.keydiff import away_from_anchor, unit_keys

        return Tile(away_from_anchor, statistic=unit_keys)

    def score(self, view: View) -> Tensor:
        directions = normalize(view.keys.float(), dim=-1).masked_fill_(~view.valid[..., None], 0.0)
        anchor = normalize(directions.sum(2)[..., None], dim=2)
        return -(directions @ anchor).squeeze(-1)
