"""Queries of the observation window of several layers, padded to the shapes that tensor cores take."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.segments import Segments
from kvpolicy_kernels.common.support import require

_MIN_QUERIES = 16  # columns of the smallest `tl.dot`


@attrs.frozen(eq=False)
class WindowQueries:
    """The last W queries of every segment, G query heads each, oldest first.

    GP and WP are G and W rounded up to powers of two, with GP·WP at least 16. Padding is zeros, before the W queries
    and after the G query heads.
    """

    queries: Tensor  # [P, GP, WP, D]
    positions: Tensor  # [L·B, WP] int32, -1 where there is no query
    group: int  # G
    scaling: float  # of the attention module, a factor on q·k

    @classmethod
    def of(
        cls, queries: Sequence[Tensor], positions: Sequence[Tensor], segments: Segments, scaling: float
    ) -> "WindowQueries":
        """Pack the queries of all layers.

        Args:
            queries: one [B, H, W, D] per layer.
            positions: one [B, W] of integers per layer, -1 where a row has had fewer than W queries.
            segments: the segments of these layers.
            scaling: factor on q·k.

        Raises:
            UnsupportedInputError: layers differ, or the query heads do not divide into the KV heads.
        """
        rows, query_heads, width, dim = queries[0].shape
        group, remainder = divmod(query_heads, segments.heads)
        require(len(queries) == len(positions) == segments.layers, "not one window for each layer")
        require(rows == segments.rows and remainder == 0 and group > 0, "query heads do not divide into the KV heads")
        require(width > 0, "the window holds no queries")
        for layer_queries, layer_positions in zip(queries, positions, strict=True):
            alike = layer_queries.shape == queries[0].shape and layer_positions.shape == (rows, width)
            require(alike, "layers differ in their window")
            require(layer_queries.dtype == queries[0].dtype, "layers differ in the dtype of their queries")
        stacked = torch.stack(list(queries)).view(segments.count, group, width, dim)
        stacked_positions = torch.stack(list(positions)).view(-1, width).to(torch.int32)
        padded_group = power_of_two(group)
        padded_width = max(power_of_two(width), _MIN_QUERIES // padded_group)
        if (padded_group, padded_width) != (group, width):
            stacked = _pad_queries(stacked, padded_group, padded_width)
            stacked_positions = torch.nn.functional.pad(stacked_positions, (padded_width - width, 0), value=-1)
        return cls(stacked.contiguous(), stacked_positions.contiguous(), group, scaling)

    @classmethod
    def meta(cls, segments: Segments, head_dim: int, group: int, width: int, dtype: torch.dtype) -> "WindowQueries":
        """`width` queries of every row on the meta device: shapes without data."""
        shape = (segments.rows, segments.heads * group, width, head_dim)
        queries = torch.empty(shape, dtype=dtype, device="meta")
        positions = torch.empty(segments.rows, width, dtype=torch.int32, device="meta")
        return cls.of([queries] * segments.layers, [positions] * segments.layers, segments, head_dim**-0.5)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def _pad_queries(stacked: Tensor, group: int, width: int) -> Tensor:
    """[P, G, W, D] padded with zeros to [P, `group`, `width`, D]."""
    padded = stacked.new_zeros(stacked.shape[0], group, width, stacked.shape[3])
    padded[:, : stacked.shape[1], width - stacked.shape[2] :] = stacked
    return padded
