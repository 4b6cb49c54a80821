"""Scorer `frame_value_norm`: norms of values, averaged over neighbours in the frames of a video (InfiniPot-V)."""

from typing import ClassVar

import attrs
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import avg_pool2d, avg_pool3d

from kvpolicy.stages import Choice, Integer, Scorer, View, parameter
from kvpolicy_plugins.scorers.shared.pooling import Pool
from kvpolicy_plugins.shared.blocks import candidate_places, in_blocks
from kvpolicy_plugins.shared.limits import MOST_PATCHES

_BY_DEPTH = (("3d", 7), ("2d", 5), ("1d", 3), ("none", 1))  # in each quarter of the layers, first to last


@attrs.frozen
class FrameValueNorm(Scorer):
    """VaN of InfiniPot-V (section 4.2): the L2 norm of the value, pooled over a grid of frames; float32 [B, K, T].

    Frames are of the candidates of a head in order of position: each `rows` · `columns` in a row are one, its patches
    row by row. What is protected (text before the video, as sinks or a region) is in no frame. After an eviction the
    grid is that of what is left, as in the authors' code: heads then hold different patches. An incomplete frame at
    the end is filled up with zeros.

    Averages are over `size` neighbours in each direction, with zeros outside that count:

    - `1d`: in the order of the candidates, beyond the ends of frames;
    - `2d`: within a frame; `3d`: also over neighbouring frames. The window is no larger than the largest odd number of
      rows, columns and whole frames;
    - `depth`, the code's `layer_adaptive_pooling`: `3d` over 7 in the first quarter of the layers, `2d` over 5 in the
      second, `1d` over 3 in the third, nothing in the last. Where the number of layers is no multiple of 4 the code
      fails in the last ones; here they are of the last quarter.

    The code pools only where it is asked to. The paper pools in 2-D by the variation of the norms in a layer, with
    thresholds that it does not tell.
    """

    name: ClassVar[str] = "frame_value_norm"
    reference: ClassVar[str] = "arXiv:2506.15745"

    rows: int = parameter(Integer(minimum=1, maximum=MOST_PATCHES), 14, help="rows of patches in a frame")
    columns: int = parameter(Integer(minimum=1, maximum=MOST_PATCHES), 14, help="patches in a row")
    pool: str = parameter(
        Choice(("none", "1d", "2d", "3d", "depth")), "none", help="neighbours that norms are means of"
    )
    size: int = parameter(
        Integer(minimum=1, maximum=15, odd=True), 3, help="patches under the window, in each direction; not for `depth`"
    )

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> str:
        return "pools over the patches of frames"

    def score(self, view: View) -> Tensor:
        norms: Tensor = vector_norm(view.values.float(), dim=-1)
        kind, size = self.pool, self.size
        if kind == "depth":
            quarter = view.layer // max(1, view.geometry.layers // 4)
            kind, size = _BY_DEPTH[min(quarter, 3)]
        if kind == "1d":
            return Pool("average", size).over(view, norms)
        frame = self.rows * self.columns
        largest = min(size, self.rows, self.columns, norms.shape[-1] // frame)
        if kind == "none" or largest < 2:
            return norms
        places = candidate_places(view)
        grid = in_blocks(norms, view.candidates, places, frame).unflatten(-1, (self.rows, self.columns))
        whole = view.candidates.sum(-1) // frame
        pooled = grid
        for smaller in range(3, largest + 1, 2):
            wide_enough = (whole >= smaller)[..., None, None, None]
            pooled = _average(grid, smaller, over_frames=kind == "3d").where(wide_enough, pooled)
        by_slot: Tensor = pooled.flatten(2).gather(-1, places)
        return by_slot


def _average(grid: Tensor, size: int, *, over_frames: bool) -> Tensor:
    """Means of a grid [B, K, F, rows, columns] over windows of `size`."""
    if over_frames:
        return avg_pool3d(grid, size, stride=1, padding=size // 2)
    pooled: Tensor = avg_pool2d(grid.flatten(0, 1), size, stride=1, padding=size // 2)
    return pooled.view(grid.shape)
