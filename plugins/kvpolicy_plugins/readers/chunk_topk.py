"""Reader `chunk_topk`: attends to the entries with the highest probabilities by a summary of few channels."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from kvpolicy.stages import Format, Integer, Number, Reader, ReadRequest, Site, parameter
from kvpolicy.stages.slots import take
from kvpolicy_plugins.readers.shared.page_bounds import Bounds
from kvpolicy_plugins.readers.shared.top_slots import top_slots

_LEAST = 1e-12  # of |q| in the channels that are read: for a query of zeros all estimates are equal


@attrs.frozen
class ChunkTopK(Reader):
    """Attends to the entries with the highest estimated probabilities, the second stage of RocketKV.

    Of each chunk of consecutive keys the minimum and the maximum are stored per channel. For the query heads q of a KV
    head:

    1. the sign of a channel is that of the sum of q over the query heads; a chunk is represented by its maximum where
       that is positive, by its minimum elsewhere;
    2. the r channels with the largest mean of |q| are read: l = their part of q · representative, for all keys of the
       chunk;
    3. estimate = softmax of l · scaling / sqrt(the share of |q| in the r channels), the mean over the query heads;
    4. attended are the `budget` entries with the highest estimates; ties to the earlier one. No entry is protected.

    With one entry a chunk and all channels, estimates are the probabilities themselves.
    """

    name: ClassVar[str] = "chunk_topk"
    reference: ClassVar[str] = "arXiv:2502.14051"
    summarises_newest: ClassVar[bool] = True

    chunk: int = parameter(Integer(minimum=1, maximum=1024), 3, help="consecutive entries that share a summary")
    channels: float = parameter(Number(above=0, maximum=1), 0.586, help="r, as a share of the channels of a head")
    budget: int = parameter(Integer(minimum=1), 128, help="entries read, at most")
    dense_first: int = parameter(Integer(minimum=0), 0, help="layers at the start that read everything")

    def pages(self, site: Site) -> Format:
        return Bounds(site.geometry.head_dim, site.dtype, self.chunk, self.chunk)

    def choose(self, request: ReadRequest) -> Tensor | None:
        if request.layer < self.dense_first or request.positions.shape[2] <= self.budget:
            return None
        held = request.positions >= 0
        best = top_slots(self.estimates(request), held, self.budget)
        unused = torch.iinfo(torch.int64).max
        slots = best.masked_fill(~held.gather(2, best), unused).sort(-1).values
        return slots.masked_fill(slots == unused, -1)

    def estimates(self, request: ReadRequest) -> Tensor:
        """Estimated probabilities of all held entries, [B, K, T] float32 or wider; 0 in empty slots."""
        queries = self._queries(request)  # [B, K, G, D]
        channels = self.best_channels(queries)  # [B, K, r]
        read = queries.gather(3, channels[:, :, None].expand(*queries.shape[:3], -1))  # [B, K, G, r]
        towards = (queries.sum(2) > 0).gather(2, channels)[..., None]  # [B, K, r, 1]
        low, high = (take(column.mT, channels) for column in self._summaries(request, queries.dtype))
        logits = read @ torch.where(towards, high, low)  # [B, K, G, chunks]
        share = read.abs().sum(-1) / queries.abs().sum(-1).clamp(min=torch.finfo(queries.dtype).tiny)
        scaling = queries.shape[-1] ** -0.5 if request.scaling is None else request.scaling
        held = request.positions >= 0
        of_slots = (logits * (scaling / share.clamp(min=_LEAST).sqrt())[..., None]).repeat_interleave(self.chunk, -1)
        masked = of_slots[..., : held.shape[2]].masked_fill(~held[:, :, None], -torch.inf)
        estimates: Tensor = masked.softmax(-1).masked_fill(~held[:, :, None], 0.0).mean(2)
        return estimates

    def best_channels(self, queries: Tensor) -> Tensor:
        """The r channels [B, K, r] with the largest mean of |q| over the query heads [B, K, G, D], ascending."""
        magnitudes = queries.abs().mean(2)
        count = max(1, int(self.channels * queries.shape[-1] + 1e-9))
        everywhere = torch.ones_like(magnitudes, dtype=torch.bool)
        return top_slots(magnitudes, everywhere, count).sort(-1).values

    def _queries(self, request: ReadRequest) -> Tensor:
        dtype = torch.promote_types(request.queries.dtype, torch.float32)
        grouped: Tensor = request.queries.to(dtype).unflatten(1, (request.geometry.kv_heads, -1))
        return grouped

    def _summaries(self, request: ReadRequest, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of all chunks, [B, K, chunks, D] each, up to that of the newest entry; zeros behind."""
        lengths = (request.positions >= 0).sum(-1, keepdim=True)
        newest = (lengths - 1).clamp(min=0) // self.chunk  # [B, K, 1]
        count = -(-request.positions.shape[2] // self.chunk)
        low, high = (self._up_to(request, name, newest, count).to(dtype) for name in ("minimum", "maximum"))
        return low, high

    def _up_to(self, request: ReadRequest, name: str, newest: Tensor, count: int) -> Tensor:
        pages = request.pages.get(name, request.newest_page[name][:, :, :0])[:, :, :count]
        whole = functional.pad(pages, (0, 0, 0, count - pages.shape[2]))
        return whole.scatter(2, newest[..., None].expand(-1, -1, -1, whole.shape[3]), request.newest_page[name])
