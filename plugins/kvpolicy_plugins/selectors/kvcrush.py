"""Selector `kvcrush`: of the blocks that scores would evict, some that represent the others stay (KVCrush)."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Choice, Integer, SelectionRequest, Selector, parameter
from kvpolicy.stages.ordering import best_first, highest
from kvpolicy_plugins.shared.blocks import in_blocks
from kvpolicy_plugins.shared.limits import SEED
from kvpolicy_plugins.shared.seeded_draws import hashed


@attrs.frozen
class KVCrush(Selector):
    """Keeps the blocks of highest score, and of the others some at evenly spread distances from an anchor.

    As in OpenVINO GenAI; the paper says the same of single tokens and their heads.

    1. The candidates of a head are cut into M blocks of `size`, in order of position; the last may be shorter. The
       score of a block is the mean of its scores.
    2. Of the floor(counts / size) blocks that stay, all but R = `representatives` are those of the highest scores. E
       are the others.
    3. x_i = 1 for the floor(n / 2) highest scores of the n candidates, else 0. The anchor c is a pattern of `size`
       bits, and the Hamming distance of a block is d_m = Σ_j [x_mj ≠ c_j] over the candidates that it has.
    4. E is sorted by d; with r = min(R, |E|), the blocks at the ranks 0, step, 2 step, … (r - 1) step stay,
       step = floor(|E| / r).
    5. Where that is less than `counts`, the highest scores of the rest stay, too.

    The code holds R blocks on top of its budget; here they are part of it. It sums scores over the heads of a layer;
    here each KV head has its own blocks. Ties go to the earlier block, where the code leaves some to its sort. Its
    `random` anchor is drawn anew for each layer and compression, as here, where it is a hash of `seed`, layer and the
    newest position of the row. `mean` has the bits that more than half of the blocks have. Candidates whose score is
    NaN are in no block, and come last.
    """

    name: ClassVar[str] = "kvcrush"
    reference: ClassVar[str] = "arXiv:2503.00022"

    size: int = parameter(Integer(minimum=1), 32, help="candidates of a block")
    representatives: int = parameter(
        Integer(minimum=0), 1, help="R, blocks that stay for their distance from the anchor; no more than stay"
    )
    anchor: str = parameter(
        Choice(("zeros", "ones", "alternating", "random", "mean")), "mean", help="what blocks are compared with"
    )
    seed: int = parameter(SEED, 0, help="seed of the random anchor")

    def select(self, request: SelectionRequest) -> Tensor:
        sound = request.candidates & ~request.scores.isnan()
        size = min(self.size, max(1, sound.shape[-1]))  # already covers all entries
        places = (sound.cumsum(-1) - 1).clamp(min=0)  # of each slot among the candidates
        inside = in_blocks(sound, sound, places, size)
        exists = inside.any(-1)
        whole = (torch.minimum(request.counts, sound.sum(-1)) // size).minimum(exists.sum(-1))
        represented = whole.clamp(max=self.representatives).minimum(exists.sum(-1) - whole)
        sums = in_blocks(request.scores, sound, places, size).sum(-1)
        best = highest(sums / inside.sum(-1).clamp(min=1), exists, whole - represented)
        important = in_blocks(highest(request.scores, sound, sound.sum(-1) // 2), sound, places, size)
        distances = self.distances(important, inside, self._anchor(request, important, inside))
        kept = best | spread(distances, exists & ~best, represented)
        stays = sound & kept.gather(-1, places // size)
        rest = highest(request.scores, request.candidates & ~stays, request.counts - stays.sum(-1))
        return stays | rest

    def distances(self, important: Tensor, inside: Tensor, anchor: Tensor) -> Tensor:
        """Hamming distances int64 [B, K, M] of blocks, bool [B, K, M, size], to an anchor that broadcasts to them."""
        return ((important != anchor) & inside).sum(-1)

    def _anchor(self, request: SelectionRequest, important: Tensor, inside: Tensor) -> Tensor:
        """Bool, broadcasts to [B, K, M, size]."""
        places = torch.arange(important.shape[-1], device=important.device)
        if self.anchor == "mean":
            return 2 * important.sum(2, keepdim=True) > inside.sum(2, keepdim=True)
        if self.anchor == "random":
            newest = request.positions.long().amax((1, 2), keepdim=True)[..., None]
            return hashed(self.seed, request.layer, newest, places, device=places.device) % 2 == 1
        patterns = {"zeros": places < 0, "ones": places >= 0, "alternating": places % 2 == 1}
        return patterns[self.anchor]


def spread(distances: Tensor, evicted: Tensor, counts: Tensor) -> Tensor:
    """Which of the `evicted` blocks stay, bool [B, K, M]: `counts` [B, K] of them, at evenly spread `distances` int64.

    Ties in the distance go to the earlier block.
    """
    ranks = best_first(-distances.float(), evicted).argsort(dim=-1)
    step = (evicted.sum(-1) // counts.clamp(min=1)).clamp(min=1)[..., None]
    return evicted & (ranks % step == 0) & (ranks < step * counts[..., None])
