"""Allocator `cake`: divides the budget over the layers by how their attention spreads and shifts."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import AllocationRequest, JointAllocator, Number, View, parameter
from kvpolicy_plugins.allocators.shared.apportion import apportion, water_fill
from kvpolicy_plugins.shared.window_attention import WindowAttention

_SMALL = 1e-10  # in the logarithm of the published code; and the least share, so that nobody divides by zero


@attrs.frozen
class Cake(JointAllocator):
    """Layers get shares of the budget by the dispersion and the shift of their attention (CAKE, section 4.2).

    With the probabilities p that the observed queries give to candidates, in all query heads of a layer:

    1. E = -sum of p · ln(p + 1e-10) (dispersion); V = sum of the unbiased variance of p over the queries (shift);
    2. preference P = E^(1/tau1) · V^(1/tau2);
    3. each layer gets the share P / sum of P, at most what it holds; what it cannot use goes to the others likewise.
       All heads of a layer keep equally many. Layers are equal in a row whose preferences are not finite.

    The paper divides while the prompt passes the layers, and cuts earlier ones again; as preferences only grow, the
    last division decides what stays, and here it is made at once. Published code clips and spreads in one pass, so that
    sums may miss the budget, and adds up E and V of all rows of a batch; here sums are exact, and rows by themselves.
    """

    name: ClassVar[str] = "cake"
    reference: ClassVar[str] = "arXiv:2503.12491"
    ragged: ClassVar[bool] = False
    reads_window: ClassVar[bool] = True

    tau1: float = parameter(Number(minimum=0.01, maximum=100), 1.0, help="temperature of the dispersion")
    tau2: float = parameter(Number(minimum=0.01, maximum=100), 1.0, help="temperature of the shift")

    def statistics(self, view: View) -> Tensor:
        """The logarithm of P, the same for all heads, [B, K] float32."""
        window = WindowAttention.of(view, view.window.shape[2])
        inside = view.candidates.flatten(0, 1)[None, :, None]
        dispersion, shift = [], []
        for heads, probabilities in window.probabilities(view):
            candidate = inside[:, heads]
            entropy = -(probabilities * (probabilities + _SMALL).log()).sum(-2)
            dispersion.append(entropy.where(candidate, 0.0).sum((-1, -2)))
            shift.append(window.variance(probabilities, heads).where(candidate, 0.0).sum((-1, -2)))
        of_rows = [torch.cat(parts, 1).view(view.positions.shape[:2]).sum(1) for parts in (dispersion, shift)]
        spread, moved = (numbers.clamp(min=torch.finfo(torch.float32).tiny).log() for numbers in of_rows)
        preference = spread / self.tau1 + moved / self.tau2
        return preference[:, None].expand(view.positions.shape[:2]).contiguous()

    def allocate(self, request: AllocationRequest) -> Tensor:
        if request.statistics is None:
            raise ValueError("this request has no statistics")
        room, total, heads = request.room, request.total, request.room.shape[2]
        weights = request.statistics[..., 0].double().softmax(0).nan_to_num(1.0).clamp(min=_SMALL).T  # [B, L]
        each = room.amin(2).T  # what all heads of a layer can keep, [B, L]
        wanted = (total // heads).minimum(each.sum(1))
        layers = apportion(water_fill(each, wanted, weights), wanted) * heads
        layers = layers + _spread_rest(room.sum(2).T - layers, total - layers.sum(1))
        counts: Tensor = apportion(water_fill(room, layers.T), layers.T)
        return counts


def _spread_rest(room: Tensor, rest: Tensor) -> Tensor:
    """`rest` [B] entries, which heads of different lengths leave over, in the first layers with room [B, L]."""
    before = room.cumsum(1) - room
    return (rest[:, None] - before).clamp(min=0).minimum(room)
