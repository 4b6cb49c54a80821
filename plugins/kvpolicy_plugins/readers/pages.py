"""Reader `pages`: attends to the pages with the highest bounds on q·k."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Format, Integer, Reader, ReadRequest, Site, parameter
from kvpolicy_plugins.readers.shared.page_bounds import Bounds
from kvpolicy_plugins.readers.shared.top_slots import top_slots
from kvpolicy_plugins.shared.gqa_group import GROUP, reduce_group


@attrs.frozen
class Pages(Reader):
    """Attends to whole pages, those with the highest bounds on q·k, Quest (section 3.3).

    1. For each page the minimum and the maximum of its keys are stored per channel;
    2. no key of the page has a larger q·k than Σ max(q·minimum, q·maximum) over the channels;
    3. the bounds of the query heads of a KV head are reduced to the largest (Quest has one query head per KV head);
    4. attended are the newest page, complete or not, and as many of the best others as `budget` allows, per KV head.
    """

    name: ClassVar[str] = "pages"
    reference: ClassVar[str] = "arXiv:2406.10774"

    page: int = parameter(Integer(minimum=1), 16, help="consecutive entries of a page")
    budget: int = parameter(Integer(minimum=1), 512, help="entries read, at most; at least one page")
    group: str = parameter(GROUP, "max", help="how the bounds of a KV head's query heads are reduced to one")
    dense_first: int = parameter(Integer(minimum=0), 2, help="layers at the start that read everything")

    def __attrs_post_init__(self) -> None:
        if self.budget < self.page:
            raise ParameterError(f"budget: must be at least one page of {self.page} entries: {self.budget}")

    def pages(self, site: Site) -> Format:
        return Bounds(site.geometry.head_dim, site.dtype, self.page, self.page)

    def choose(self, request: ReadRequest) -> Tensor | None:
        if request.layer < self.dense_first or request.positions.shape[2] <= self.budget:
            return None
        lengths = (request.positions >= 0).sum(-1, keepdim=True, dtype=torch.int32).long()  # [B, K, 1]
        newest = (lengths - 1).clamp(min=0) // self.page  # the page of the newest entry
        wanted = (self.budget - (lengths - newest * self.page)) // self.page
        chosen = self._best(self.bounds(request), newest, wanted)
        return self._slots(torch.cat([chosen, newest], -1), lengths)

    def bounds(self, request: ReadRequest) -> Tensor:
        """Upper bounds [B, K, pages] of q·k for the keys of each page, reduced by `group` over the query heads."""
        dtype = torch.promote_types(request.queries.dtype, torch.float32)
        low, high = (request.pages[name].to(dtype).transpose(-1, -2) for name in ("minimum", "maximum"))
        queries = request.queries.to(dtype).unflatten(1, (request.geometry.kv_heads, -1))
        bounds = queries.clamp(min=0) @ high + queries.clamp(max=0) @ low  # [B, K, G, pages]
        return reduce_group(bounds, self.group)[:, :, 0]

    def _best(self, bounds: Tensor, newest: Tensor, wanted: Tensor) -> Tensor:
        """Pages [B, K, n] before the newest, the best `wanted` of each head, padded with -1."""
        earlier = torch.arange(bounds.shape[-1], device=bounds.device) < newest
        best = top_slots(bounds, earlier, self.budget // self.page)
        rank = torch.arange(best.shape[-1], device=best.device)
        return best.masked_fill(rank >= torch.minimum(wanted, newest), -1)

    def _slots(self, pages: Tensor, lengths: Tensor) -> Tensor:
        """Slots of the pages, ascending, padded with -1."""
        unused = torch.iinfo(torch.int64).max
        slots = pages[..., None] * self.page + torch.arange(self.page, device=pages.device)
        slots = slots.masked_fill(pages[..., None] < 0, unused).flatten(2)
        slots = slots.masked_fill(slots >= lengths, unused).sort(-1).values[..., : self.budget]
        return slots.masked_fill(slots == unused, -1)
