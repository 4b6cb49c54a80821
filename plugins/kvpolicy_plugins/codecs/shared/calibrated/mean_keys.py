"""The mean key of each head at the position of an entry, measured on a text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Rotary, Sample, Site
from kvpolicy_plugins.codecs.shared.calibrated.known_rotary import known

_SPAN = 128  # positions that share a mean: within them, pairs that turn by much have a mean of about zero
_MOST_SPANS = 512  # what comes later has the mean of the last one


@attrs.frozen(eq=False)
class MeanKeys:
    """A mean at each of the first positions, where attention sinks are, and one for all others, turned to theirs.

    Keys lie around a mean before rotation, so the mean is taken there, and rotated: to the positions of a span, of
    which it is the mean again. It then holds for texts of any length. All sequences share them: D numbers a head for
    each 128 positions, up to position 65,536.
    """

    first: Tensor  # [K, P, D] float32, at the first P positions
    others: Tensor  # [K, D] float32, before rotation
    rotary: Rotary
    to_basis: Callable[[Tensor], Tensor]  # of the format that reads them
    heads: Tensor | None = None  # int64 [n], of entries [1, 1, n] of several heads; None = entries are [b, K, n]
    _tables: dict[tuple[torch.device, torch.dtype], Tensor] = attrs.field(factory=dict, repr=False)

    def at(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Means [b, K, n, D] for entries at positions [b, K, n], in the basis; empty slots have that of position 0."""
        places, first = positions.clamp(min=0), self.first.shape[1]
        table = self._table(places, dtype)
        rows = torch.where(places < first, places, first + places // _SPAN).clamp(max=table.shape[1] - 1)
        heads = torch.arange(table.shape[0], device=rows.device)[:, None] if self.heads is None else self.heads
        rows = rows + heads.to(rows.device) * table.shape[1]
        return table.flatten(0, 1).index_select(0, rows.flatten()).view(*positions.shape, table.shape[2])

    def of_head(self, head: int) -> Self:
        """Those of one head."""
        own = slice(head, head + 1)
        return attrs.evolve(self, first=self.first[own], others=self.others[own], tables={})

    def of_entries(self, heads: Sequence[int], counts: Sequence[int]) -> Self:
        """Those of entries [1, 1, n] behind each other: `counts[i]` of head `heads[i]`."""
        return attrs.evolve(self, heads=torch.tensor(heads).repeat_interleave(torch.tensor(counts)))

    def _table(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """[K, P + spans, D], as long as these positions need on a CPU; elsewhere the host would wait to be told."""
        table, spans = self._tables.get((places.device, dtype)), _MOST_SPANS
        if places.device.type == "cpu":
            needed = int(places.max()) // _SPAN + 1 if places.numel() else 1
            spans = min(spans, 1 << (needed - 1).bit_length())
        if table is None or table.shape[1] < self.first.shape[1] + spans:
            table = self._made(spans, places.device, dtype)
            self._tables[places.device, dtype] = table
        return table

    @torch.inference_mode(mode=False)  # so that the table can be used outside of it later
    def _made(self, spans: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        first, others = (mean.to(device, dtype) for mean in (self.first, self.others))
        places = torch.arange(_SPAN, device=device).expand(len(others), -1)
        turned = (
            self.rotary.rotate(others[:, None].expand(-1, _SPAN, -1), places + _SPAN * span).mean(1)
            for span in range(spans)
        )
        return self.to_basis(torch.cat([first, torch.stack(list(turned), 1)], 1))


def measured(samples: Sequence[Sample], first: int) -> list[dict[str, Tensor]]:
    """Per layer the means of `MeanKeys`: `first` [K, P, D] of the first P positions, `others` [K, D], float32.

    A text that is no longer than P has no others; they are then zero. Raises ParameterError without a rotation.
    """
    return [_of_layer(sample, min(first, sample.keys.shape[2])) for sample in samples]


def _of_layer(sample: Sample, first: int) -> dict[str, Tensor]:
    exact = sample.keys.double()
    positions = torch.arange(exact.shape[2], device=exact.device)
    others = known(sample.rotary, "centre").unrotate(exact[:, :, first:], positions[first:])
    count = max(1, others.shape[0] * others.shape[2])
    return {"first": exact[:, :, :first].mean(0).float(), "others": (others.sum((0, 2)) / count).float()}


def checked(site: Site, to_basis: Callable[[Tensor], Tensor]) -> MeanKeys:
    """What a calibration says of a layer. Raises ParameterError where it is not of such a layer."""
    heads, dim = site.geometry.kv_heads, site.geometry.head_dim
    calibration: Mapping[str, Tensor] = site.calibration
    if not {"first", "others"} <= calibration.keys():
        raise ParameterError("centre: needs a calibration: 'calibrated'")
    first, others = calibration["first"], calibration["others"]
    expected = (heads, first.shape[1] if first.ndim > 1 else 0, dim)
    for name, tensor, shape in (("first", first, expected), ("others", others, (heads, dim))):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ParameterError(f"centre: {name} must be float32 {list(shape)}: {tensor.dtype} {list(tensor.shape)}")
    return MeanKeys(first, others, known(site.rotary, "centre"), to_basis)
