"""Input and output of the methods in plain torch."""

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

Entries = tuple[Tensor, Tensor]  # keys and values [B, K, N, D]


@attrs.frozen(eq=False)
class LayerTensors:
    """One layer before a compression."""

    keys: Tensor  # [B, K, T, D]
    values: Tensor  # [B, K, T, D]
    queries: Tensor  # [B, H, W, D], the newest
    scaling: float

    @property
    def group(self) -> int:
        """G."""
        return self.queries.shape[1] // self.keys.shape[1]


Naive = Callable[[LayerTensors, int], object]  # of a layer and the budget N


def gathered(layer: LayerTensors, chosen: Tensor, recent: int) -> Entries:
    """Chosen slots [B, K, n] of what is not recent, then what is: a gather with indices expanded over D, and a cat."""
    index = chosen[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
    past = layer.keys.shape[2] - recent
    return _joined(layer.keys, index, past), _joined(layer.values, index, past)


def _joined(entries: Tensor, index: Tensor, past: int) -> Tensor:
    return torch.cat([entries[:, :, :past].gather(2, index), entries[:, :, past:]], 2)
