"""Scorer `leverage`: how much of the span of a head's keys depends on one of them."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Integer, Needs, Number, Scorer, View, parameter
from kvpolicy_plugins.shared.limits import MOST_RANK, SEED
from kvpolicy_plugins.shared.seeded_draws import sketch


@attrs.frozen
class Leverage(Scorer):
    """Approximate statistical leverage of keys before rotation, the query-agnostic part of Compactor (section 3).

    1. X = (k - mean of k over the held entries) G, [B, K, T, rank], of the keys k before rotation and a Gaussian
       sketch G [D, rank] of variance 1 / rank;
    2. score = x (XᵀX + ridge · I)⁻¹ xᵀ of each row x, float32 [B, K, T]: from 0 to 1, with a sum of at most `rank`.

    The Gram matrix and its Cholesky factor are in float64, where `ridge` is above the rounding of long sequences: the
    published code works in float32, and multiplies the ridge by ten until the factor exists. It draws a sketch for
    each head; here all heads of a row share one, drawn at every compression from `seed`, the layer and the row's newest
    position, so that a row draws the same alone and in a batch. kvpress standardises over the whole batch; here
    `normalise: standard` does it for each head.

    Models whose rotary embedding is not known are refused when a plan is made.
    """

    name: ClassVar[str] = "leverage"
    reference: ClassVar[str] = "arXiv:2507.08143"

    rank: int = parameter(Integer(minimum=1, maximum=MOST_RANK), 48, help="columns of the Gaussian sketch")
    ridge: float = parameter(Number(minimum=1e-6, maximum=1e6), 1e-2, help="added to the diagonal of the Gram matrix")
    seed: int = parameter(SEED, 0, help="seed of the sketch")

    def needs(self) -> Needs:
        return Needs(rotary=True)

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> str:
        return "solves a linear system for each head"

    def score(self, view: View) -> Tensor:
        newest = view.positions.amax((1, 2)).long()
        return self.sketched(view, sketch(self.seed, view.layer, newest, view.keys.shape[-1], self.rank))

    def sketched(self, view: View, gaussian: Tensor) -> Tensor:
        """`score` with the sketch given, float32 [B or 1, K or 1, D, rank]."""
        empty = ~view.valid[..., None]
        keys = view.unrotated_keys.masked_fill(empty, 0.0)
        mean = keys.sum(2, keepdim=True) / view.lengths[..., None, None].clamp(min=1)
        rows = ((keys - mean) @ gaussian).masked_fill(empty, 0.0).double()
        ridge = self.ridge * torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
        factor = torch.linalg.cholesky_ex(rows.mT @ rows + ridge).L
        whitened: Tensor = torch.linalg.solve_triangular(factor, rows.mT, upper=False)
        return whitened.square().sum(-2).float()
