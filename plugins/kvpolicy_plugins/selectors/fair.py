"""Selector `fair`: every region of the request keeps the same share of its entries."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Choice, SelectionRequest, Selector, parameter
from kvpolicy.stages.ordering import highest
from kvpolicy_plugins.allocators.shared.apportion import apportion
from kvpolicy_plugins.selectors.shared.ranking import group_ranks

_REGIONS = torch.iinfo(torch.int8).max + 1  # numbers that entries can have, 0 = in no region


@attrs.frozen
class Fair(Selector):
    """Divides what a head keeps over the regions in proportion to their candidates; in each, the best stay.

    Fair eviction of "The Pitfalls of KV Cache Compression": quota_X = counts · n_X / n, in whole entries.
    Entries in no region are a region of their own. What the policy protects stays beside the quotas. Without regions
    the best candidates stay. Candidates whose score is NaN are in no region, and come last.

    The paper rounds each quota; here those with the largest remainders are rounded up, so that counts are exact. The
    published code knows two adjacent spans, extended to cover everything, and gives the earlier floor(quota), the
    later what is left: `rounding: cumulative` gives the first j regions together the floor of their sum, which is the
    same for two. The code also lets the queries of a span vote for its own keys only; here scores are the scorer's.
    """

    name: ClassVar[str] = "fair"
    reference: ClassVar[str] = "arXiv:2510.00231"

    rounding: str = parameter(
        Choice(("largest_remainder", "cumulative")),
        "largest_remainder",
        help="how quotas become whole: the largest remainders are rounded up, or as in the published code",
    )

    def select(self, request: SelectionRequest) -> Tensor:
        regions = torch.zeros_like(request.positions) if request.regions is None else request.regions
        regions = regions.long()
        sizes = regions.new_zeros((*regions.shape[:2], _REGIONS))
        sound = request.candidates & ~request.scores.isnan()
        sizes = sizes.scatter_add_(-1, regions, sound.long())
        shared = torch.minimum(request.counts, sound.sum(-1))
        quotas = self._quotas(sizes, shared)
        before = (sizes.cumsum(-1) - sizes).gather(-1, regions)
        ranks = group_ranks(regions, request.scores, sound) - before
        rest = highest(request.scores, request.candidates & ~sound, request.counts - shared)
        return rest | (sound & (ranks < quotas.gather(-1, regions)))

    def _quotas(self, sizes: Tensor, counts: Tensor) -> Tensor:
        """Candidates that stay of each region, int64 [B, K, regions]; none above its size, and `counts` in all."""
        counts = counts[..., None]
        total = sizes.sum(-1, keepdim=True).clamp(min=1)
        if self.rounding == "cumulative":
            ends = counts * sizes.cumsum(-1) // total
            return ends.diff(dim=-1, prepend=torch.zeros_like(counts))
        return apportion(counts.double() * sizes / total, counts[..., 0])
