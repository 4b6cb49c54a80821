"""Reader `latent_topk`: attends to the entries with the highest latent scores."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Integer, Number, Reader, ReadRequest, parameter
from kvpolicy.stages.slots import indices_of
from kvpolicy_plugins.codecs.shared.calibrated.latent_keys import LatentKeys
from kvpolicy_plugins.readers.shared.top_slots import top_slots


@attrs.frozen
class LatentTopK(Reader):
    """Attends to the first, the most recent and the critical entries, which have the highest latent scores (SALS).

    1. q̃ = Uᵀ q, where q is the query before rotation, the mean over the query heads of each KV head, side by side;
    2. score of an entry = q̃·k̃ over the first r* of the r dimensions, one for all heads;
    3. attended are the `sinks` first entries, the `recent` last ones, the `critical` best between them, ties to the
       earlier one, and the entries that are not packed yet, which have no latent.

    The first layers and the last one attend to too many entries for this, so they read all entries.
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
        key_format, geometry = request.format, request.geometry
        if not isinstance(key_format, LatentKeys):
            raise TypeError(f"keys must be stored as latents: {type(key_format).__name__}")
        plain = key_format.unrotate(request.queries, request.query_positions[:, None])
        per_head = plain.unflatten(1, (geometry.kv_heads, geometry.group)).mean(2)
        return key_format.project(per_head.flatten(1))

    def scores(self, request: ReadRequest) -> Tensor:
        """q̃·k̃ [B, packed entries] in the dtype of q̃; undefined after the last packed entry of a row."""
        query = self.latent_query(request)
        dims = max(1, round(self.dims * query.shape[-1]))
        latents = request.packed["latent"][:, 0, :, :dims].to(query.dtype)
        return (latents @ query[:, :dims, None])[..., 0]

    def _between(self, request: ReadRequest, packed_lengths: Tensor) -> Tensor:
        """[B, T] bool: packed entries that are neither sinks nor recent."""
        positions = request.positions[:, 0]  # all heads of a joint store have equal lengths
        lengths = (positions >= 0).sum(-1)
        last = torch.minimum(lengths - self.recent, packed_lengths[:, 0]).masked_fill(lengths < self.min_length, 0)
        slots = torch.arange(positions.shape[1], device=positions.device)
        return (slots >= self.sinks) & (slots < last[:, None])

    def _best(self, scores: Tensor, between: Tensor) -> Tensor:
        """[B, T] bool: the `critical` highest scores of each row; may include other slots if there are fewer."""
        missing = between.shape[1] - scores.shape[1]
        best = top_slots(torch.nn.functional.pad(scores, (0, missing)), between, self.critical)
        return torch.zeros_like(between).scatter_(-1, best, value=True)
