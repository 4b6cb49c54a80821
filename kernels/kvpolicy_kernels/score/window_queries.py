"""The observation window of several layers at once, packed for the tensor cores."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.segments import Segments
from kvpolicy_kernels.common.support import require

_NARROWEST = 16  # columns: the smallest product that every tensor core takes


@attrs.frozen(eq=False)
class Window:
    """The last W queries of every segment, G query heads each; the newest query is the last one.

    GP and WP are G and W rounded up to powers of two, WP also until GP·WP is 16. Padding stands in front of the
    queries and behind the query heads, and is zeros.
    """

    queries: Tensor  # [P, GP, WP, D]
    positions: Tensor  # [L·B, WP] int32, -1 where there is no query
    group: int  # G
    scaling: float  # the attention module's own factor on q·k

    @classmethod
    def of(cls, queries: Sequence[Tensor], positions: Sequence[Tensor], segments: Segments, scaling: float) -> "Window":
        """Of one [B, H, W, D] and one integer [B, W] a layer, -1 where a row has had fewer queries.

        Raises:
            UnsupportedInputError: layers that differ, or query heads that do not divide into the KV heads.
        """
        rows, query_heads, width, dim = queries[0].shape
        group, rest = divmod(query_heads, segments.heads)
        require(len(queries) == len(positions) == segments.layers, "not one window for each layer")
        require(rows == segments.rows and rest == 0 and group > 0, "query heads do not divide into the KV heads")
        require(width > 0, "the window holds no queries")
        for one, places in zip(queries, positions, strict=True):
            require(one.shape == queries[0].shape and places.shape == (rows, width), "layers differ in their window")
            require(one.dtype == queries[0].dtype, "layers differ in the dtype of their queries")
        stacked = torch.stack(list(queries)).view(segments.count, group, width, dim)
        places = torch.stack(list(positions)).view(-1, width).to(torch.int32)
        padded_group = power_of_two(group)
        padded_width = max(power_of_two(width), _NARROWEST // padded_group)
        if (padded_group, padded_width) != (group, width):
            stacked = _placed(stacked, padded_group, padded_width)
            places = torch.nn.functional.pad(places, (padded_width - width, 0), value=-1)
        return cls(stacked.contiguous(), places.contiguous(), group, scaling)


def power_of_two(number: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << max(0, number - 1).bit_length()


def _placed(stacked: Tensor, group: int, width: int) -> Tensor:
    """[P, G, W, D] within zeros [P, `group`, `width`, D]."""
    padded = stacked.new_zeros(stacked.shape[0], group, width, stacked.shape[3])
    padded[:, : stacked.shape[1], width - stacked.shape[2] :] = stacked
    return padded
