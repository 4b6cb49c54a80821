"""Merger `drop`: drops evicted entries."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import Entries, Merger, View
from kvpolicy.stages.slots import gather


@attrs.frozen
class Drop(Merger):
    """Keeps the entries of the kept slots as they are, bit for bit; padding slots are zero."""

    name: ClassVar[str] = "drop"
    layers_as_rows: ClassVar[bool] = True
    moves_only: ClassVar[bool] = True

    def merge(self, view: View, kept: Tensor) -> Entries:
        votes = None if view.log_votes is None else gather(view.log_votes, kept)
        return Entries(gather(view.keys, kept), gather(view.values, kept), votes)
