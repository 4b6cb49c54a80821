"""The entries whose latent keys answer the query best."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Integer, Number, Reader, ReadRequest, parameter
from kvpolicy.stages.slots import indices_of
from kvpolicy_plugins.codecs.latent import LatentKeys
from kvpolicy_plugins.readers.shared.top_slots import top_slots


@attrs.frozen
class LatentTopK(Reader):
    """The first, the latest and the critical entries: those of the highest latent scores, SALS.

    1. q̃ = Uᵀ q, where q is the query before rotation, the mean over the query heads of each KV head, side by side;
    2. score of an entry = q̃·k̃ over the first r* of the r dimensions, one for all heads;
    3. read are the `sinks` first entries, the `recent` last ones, and the `critical` best between them, the earlier
       of equal ones; and those that are not packed yet, which have no latent.

    The first layers and the last one spread their attention too widely for this, and read everything.
    """

    name: ClassVar[str] = "latent_topk"
    reference: ClassVar[str] = "arXiv:2510.24273"
    stores: ClassVar[tuple[str, ...]] = ("latent",)

    sinks: int = parameter(Integer(minimum=0), 16, help="entries at the start that are always read")
    critical: int = parameter(Integer(minimum=1), 432, help="entries with the highest scores that are read")
    recent: int = parameter(Integer(minimum=0), 64, help="entries at the end that are always read")
    dims: float = parameter(Number(above=0, maximum=1), 0.5, help="r* as a share of r: dimensions that scores look at")
    dense_first: int = parameter(Integer(minimum=0), 2, help="layers at the start that read everything")
    dense_last: int = parameter(Integer(minimum=0), 1, help="layers at the end that read everything")
    min_length: int = parameter(Integer(minimum=0), 0, help="a row with fewer entries reads all of them")

    def choose(self, request: ReadRequest) -> Tensor | None:
        slots, layers = request.positions.shape[2], request.geometry.layers
        dense = request.layer < self.dense_first or request.layer >= layers - self.dense_last
        short = slots <= self.sinks + self.critical + self.recent or slots < self.min_length
        if dense or short or request.packed_lengths is None:
            return None
        between = self._between(request, request.packed_lengths)
        critical = self._best(self.scores(request), between)
        read = (request.positions[:, 0] >= 0) & (critical | ~between)
        return indices_of(read[:, None]).expand(-1, request.geometry.kv_heads, -1)

    def latent_query(self, request: ReadRequest) -> Tensor:
        """q̃ [B, r], in float32 or the wider dtype of the basis."""
        form, geometry = request.format, request.geometry
        if not isinstance(form, LatentKeys):
            raise TypeError(f"keys must be held as latents: {type(form).__name__}")
        plain = form.unrotate(request.queries, request.query_positions[:, None])
        per_head = plain.unflatten(1, (geometry.kv_heads, geometry.group)).mean(2)
        return form.project(per_head.flatten(1))

    def scores(self, request: ReadRequest) -> Tensor:
        """[B, units] q̃·k̃ of the packed entries, in the dtype of q̃; behind a row's last one it is junk."""
        query = self.latent_query(request)
        dims = max(1, round(self.dims * query.shape[-1]))
        latents = request.packed["latent"][:, 0, :, :dims].to(query.dtype)
        return (latents @ query[:, :dims, None])[..., 0]

    def _between(self, request: ReadRequest, packed_lengths: Tensor) -> Tensor:
        """[B, T] bool: packed entries that are neither among the first nor among the last."""
        positions = request.positions[:, 0]  # all heads of a joint store hold equally many entries
        lengths = (positions >= 0).sum(-1)
        last = torch.minimum(lengths - self.recent, packed_lengths[:, 0]).masked_fill(lengths < self.min_length, 0)
        slots = torch.arange(positions.shape[1], device=positions.device)
        return (slots >= self.sinks) & (slots < last[:, None])

    def _best(self, scores: Tensor, between: Tensor) -> Tensor:
        """[B, T] bool: the `critical` highest scores of each row; if it has fewer, slots that are read anyway, too."""
        missing = between.shape[1] - scores.shape[1]
        best = top_slots(torch.nn.functional.pad(scores, (0, missing)), between, self.critical)
        return torch.zeros_like(between).scatter_(-1, best, value=True)
