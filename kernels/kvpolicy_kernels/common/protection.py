"""Which entries of each head are protected, as launchers pass it to kernels: by place at both ends, and by a label."""

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.segments import Segments
from kvpolicy_kernels.common.support import require


@attrs.frozen(eq=False)
class Protection:
    """Protected entries of P segments of up to T entries; an entry may be protected in more than one way."""

    sinks: int  # positions below are protected
    recent: int  # how many of the newest entries of a head are
    pinned: Tensor | None = None  # [P, T] uint8, not 0 = protected beside those; None = none is

    @classmethod
    def of(cls, segments: Segments, sinks: int, recent: int, pinned: Tensor | None) -> "Protection":
        """With a label [P, T] of bool or uint8, which is not copied.

        Raises UnsupportedInputError for a label that kernels cannot read.
        """
        require(sinks >= 0 and recent >= 0, "sinks and recent must not be negative")
        if pinned is None:
            return cls(sinks, recent)
        require(pinned.dtype in (torch.bool, torch.uint8), f"pinned of {pinned.dtype}")
        require(pinned.shape == (segments.count, segments.longest), "pinned is not one item for each slot")
        require(pinned.is_contiguous(), "pinned is not contiguous")
        require(pinned.device == segments.starts.device, "pinned is on another device")
        return cls(sinks, recent, pinned.view(torch.uint8))

    @classmethod
    def meta(cls, segments: Segments, sinks: int, recent: int, *, pinned: bool) -> "Protection":
        """On the meta device: shapes without data."""
        shape = (segments.count, segments.longest)
        return cls(sinks, recent, torch.empty(shape, dtype=torch.uint8, device="meta") if pinned else None)
