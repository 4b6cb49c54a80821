"""Allocator `pyramid`: larger budgets for the lower layers."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import AllocationRequest, Choice, LayerAllocator, Number, parameter
from kvpolicy_plugins.allocators.shared.apportion import apportion


@attrs.frozen
class Pyramid(LayerAllocator):
    """Budgets that fall linearly from the first layer to the last, PyramidKV (section 4.2).

    With `mean` unprotected entries per layer, the last layer gets low = mean / beta and the first one
    high = 2 · mean - low, limited to the entries that there are. Protected entries come on top, in every layer.

    `conserve` rounds so that the sum is the budget. `floor_step` is the published integer code: it floors the
    step between layers, so the sum exceeds the budget, and layers are equal while a sequence is below 2 · mean.
    """

    name: ClassVar[str] = "pyramid"
    reference: ClassVar[str] = "arXiv:2406.02069"

    beta: float = parameter(Number(above=0, maximum=1e6), 20, help="how much narrower the top is than the mean")
    rounding: str = parameter(Choice(("conserve", "floor_step")), "conserve", help="exact sum, or the published code")

    def allocate(self, request: AllocationRequest) -> Tensor:
        layers, limits = len(request.room), request.room[0, :, 0].tolist()
        pairs = zip(request.total.tolist(), limits, request.tokens.tolist(), strict=True)
        shares = [self._shares(total // layers, room, tokens, layers) for total, room, tokens in pairs]
        return torch.tensor(shares, dtype=torch.int64).T[..., None]

    def _shares(self, mean: int, limit: int, tokens: int, layers: int) -> tuple[int, ...]:
        """Candidates of each layer, `mean` on average and at most `limit`."""
        if mean >= limit or layers == 1:
            return (mean,) * layers
        if self.rounding == "conserve":
            return self._ramp(mean, limit, layers)
        if tokens < 2 * mean:
            return (mean,) * layers
        return self._floored_ramp(mean, limit, layers)

    def _ramp(self, mean: int, limit: int, layers: int) -> tuple[int, ...]:
        low = min(mean / self.beta, 2 * mean, limit)
        high = 2 * mean - low
        if high > limit:
            low, high = 2 * mean - limit, limit
        steps = torch.arange(layers, dtype=torch.float64) / (layers - 1)
        shares = apportion(high - (high - low) * steps, torch.tensor(mean * layers))
        return tuple(shares.tolist())

    def _floored_ramp(self, mean: int, limit: int, layers: int) -> tuple[int, ...]:
        high = min(2 * mean - int(min(mean // self.beta, 2 * mean)), limit)
        step = (2 * high - 2 * mean) // (layers - 1)
        return tuple(high - layer * step for layer in range(layers))
