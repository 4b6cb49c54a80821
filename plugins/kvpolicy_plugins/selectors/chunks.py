"""Selector `chunks`: contiguous entries stay or go together (ChunkKV)."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor
from torch.nn.functional import pad

from kvpolicy.stages import Choice, Integer, SelectionRequest, Selector, parameter
from kvpolicy.stages.ordering import best_first
from kvpolicy_plugins.selectors.shared.ranking import group_ranks


@attrs.frozen
class Chunks(Selector):
    """Keeps whole chunks of contiguous entries, those with the highest scores, as ChunkKV does.

    1. The entries that a head holds, in order of position, are cut into chunks of `size`; the last may be shorter.
    2. The score of a chunk is the mean (or sum) of the scores of its candidates.
    3. Whole chunks stay, best first; ties go to the earlier chunk. Of the first that does not fit whole, the entries
       with the highest scores fill what is left, so that counts are exact; the paper keeps floor(budget / size) chunks.

    The paper adds up scores, which ranks chunks of one length alike and a shorter one lower. Entries that it cuts
    once, after the prompt, are here cut anew at every compression, from what is held then. Candidates whose score is
    NaN count in no chunk, and come last. That several layers keep the indices of the first of them, to
    compute fewer, is left out: it is another approximation, and here every layer chooses for itself.
    """

    name: ClassVar[str] = "chunks"
    reference: ClassVar[str] = "arXiv:2502.00299"

    size: int = parameter(Integer(minimum=1), 10, help="contiguous entries of a chunk")
    reduce: str = parameter(Choice(("mean", "sum")), "mean", help="how the scores of a chunk's candidates become one")

    def select(self, request: SelectionRequest) -> Tensor:
        scored = request.candidates & (request.scores > -torch.inf)  # False for NaN, too
        order = best_first(*self._chunk_scores(request.scores, scored))
        places = torch.arange(request.scores.shape[-1], device=order.device) // self._size(request.scores)
        ranks = order.argsort(dim=-1)[..., places].masked_fill(~scored, order.shape[-1])
        return request.candidates & (group_ranks(ranks, request.scores, request.candidates) < request.counts[..., None])

    def _size(self, scores: Tensor) -> int:
        return min(self.size, max(1, scores.shape[-1]))  # already covers all entries

    def _chunk_scores(self, scores: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the chunks, float32 [B, K, C], and which have a score, bool [B, K, C]."""
        size = self._size(scores)
        missing = -scores.shape[-1] % size
        sums = pad(scores.masked_fill(~scored, 0.0), (0, missing)).unflatten(-1, (-1, size)).sum(-1)
        counts = pad(scored, (0, missing)).unflatten(-1, (-1, size)).sum(-1)
        return sums / counts.clamp(min=1) if self.reduce == "mean" else sums, counts > 0
