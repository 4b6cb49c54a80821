"""Outputs that cannot lie: filled with NaN where nothing was written, with sentinels on both sides."""

import torch
from torch import Tensor

_BAND = 256  # elements


class Guarded:
    """A tensor inside a larger one; `check` fails when something was written beside it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
        count = torch.Size(shape).numel()
        sentinel = -77 if not dtype.is_floating_point else -12345.0
        self.whole = torch.full((count + 2 * _BAND,), sentinel, dtype=dtype, device=device)
        self.sentinel = self.whole[0].clone()
        self.tensor: Tensor = self.whole[_BAND : _BAND + count].view(shape)
        poison = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        self.tensor.fill_(poison)

    def check(self) -> None:
        """Fail when a sentinel has changed."""
        for name, band in (("before", self.whole[:_BAND]), ("behind", self.whole[-_BAND:])):
            wrong = (band != self.sentinel).nonzero().flatten().tolist()
            assert not wrong, f"written {name} the output, at {wrong[:5]}"
