"""Selector `temporal_redundancy`: what recent frames of a video do not repeat, then the best scores (InfiniPot-V)."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor
from torch.linalg import vector_norm

from kvpolicy.stages import Integer, Number, SelectionRequest, Selector, View, parameter
from kvpolicy.stages.ordering import highest
from kvpolicy_plugins.shared.blocks import candidate_places, gather_blocks
from kvpolicy_plugins.shared.limits import MOST_PATCHES


@attrs.frozen
class TemporalRedundancy(Selector):
    """Recent frames, past patches whose keys the recent frames do not repeat, and the rest by score.

    Continual compression of InfiniPot-V (section 4, algorithm 1). The candidates of a head, in order of position, are
    F frames of p = `tokens_per_frame` patches, which may be followed by an incomplete frame. What is protected (text
    before the video, as sinks or a region) is in no frame; text that is not protected is taken for patches.

    1. The last r = floor(F · `recent_frames`) frames and the incomplete one stay; where they are more than the head
       keeps, the newest entries of them.
    2. TaR of patch i of a past frame t = -(1 / r) Σ_t' cos(k_ti, k_t'i) over the recent frames t'. Of the n candidates
       that stay, n - round((1 - `share`) n), those of step 1 among them, are the ones of highest TaR.
    3. The others are those with the highest scores of the rest: `frame_value_norm` in the paper.

    Without a recent frame (r = 0) there is nothing to compare with, and step 2 takes none; the code then compares with
    all frames, and fails where step 1 takes more than the share. With `share: 0` the code keeps recent frames by score,
    too: that is `recent_frames: 0`. After an eviction heads hold different patches, and the grid is that of what is
    left, as in the code: patch i is the i-th one in its frame, not a place in the picture.
    """

    name: ClassVar[str] = "temporal_redundancy"
    reference: ClassVar[str] = "arXiv:2506.15745"

    tokens_per_frame: int = parameter(
        Integer(minimum=1, maximum=MOST_PATCHES**2), 196, help="p, candidates that are one frame"
    )
    recent_frames: float = parameter(
        Number(minimum=0, maximum=1), 0.125, help="share of the frames that stay, and that others are compared with"
    )
    share: float = parameter(
        Number(minimum=0, maximum=1), 0.5, help="of what stays, the part that is recent or differs from what is"
    )

    def second_scores(self, view: View) -> Tensor:
        """TaR, float32 [B, K, T]; any number outside the past frames."""
        patches = self.tokens_per_frame
        if view.positions.shape[-1] < patches:  # no whole frame
            return torch.zeros(view.positions.shape, dtype=torch.float32, device=view.keys.device)
        places = candidate_places(view)
        grid = gather_blocks(view.keys, view.candidates, places, patches).float()  # [B, K, F, p, D]
        grid = grid / (vector_norm(grid, dim=-1, keepdim=True) + 1e-9)
        whole, recent = (count[..., None] for count in self._frames(view.candidates))
        frames = torch.arange(grid.shape[2], device=grid.device)
        shown = (frames >= whole - recent) & (frames < whole)
        mean = grid.masked_fill(~shown[..., None, None], 0.0).sum(2) / recent[..., None].clamp(min=1)
        repeated: Tensor = (grid * mean[:, :, None]).sum(-1)
        by_slot: Tensor = repeated.flatten(2).gather(-1, places)
        return -by_slot

    def select(self, request: SelectionRequest) -> Tensor:
        redundancy, candidates = request.second_scores, request.candidates
        if redundancy is None:
            raise ValueError("temporal_redundancy is not told how keys differ: give it what its second_scores returned")
        whole, recent = self._frames(candidates)
        places = candidates.cumsum(-1) - 1
        sound = candidates & ~request.scores.isnan()
        newest = sound & (places >= ((whole - recent) * self.tokens_per_frame)[..., None])
        kept = highest(places.float(), newest, request.counts.minimum(newest.sum(-1)))
        quota = request.counts - (request.counts.double() * (1 - self.share)).round().long()  # half to even
        past = sound & ~newest
        differing = (quota - kept.sum(-1)).clamp(min=0).minimum(past.sum(-1)) * (recent > 0)
        kept = kept | highest(redundancy, past, differing)
        return kept | highest(request.scores, candidates & ~kept, request.counts - kept.sum(-1))

    def _frames(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """How many whole frames the candidates [B, K, T] of each head are, and how many of these are recent."""
        whole = candidates.sum(-1) // self.tokens_per_frame
        return whole, (whole.double() * self.recent_frames + 1e-9).floor().long()
