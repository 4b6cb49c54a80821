"""Faults that decode steps of fixed shapes count on a device: read without waiting for it, and never silent."""

import torch
from torch import Tensor

from kvpolicy.errors import UnsupportedCallError
from kvpolicy.plan.compress.nan import warn_of_nan


class DeviceFaults:
    """How many rows came with another mask than was expected, and how many scores were NaN, of how many.

    On a GPU the numbers are copied in the background: what happened in one step is known in one of the next.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._known = [0, 0, 0]
        self._copy = torch.zeros(3, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None

    @property
    def masks(self) -> Tensor:
        """Rows with an unexpected mask, a view of one number."""
        return self.counts[0]

    @property
    def nan(self) -> Tensor:
        """Scores that were NaN, and all scores: a view of two numbers."""
        return self.counts[1:]

    def poll(self) -> None:
        """Look at what is known by now, and ask for the next numbers. Raises as `flush` does."""
        if not self.counts.is_cuda:
            self._judge(self.counts)
            return
        if self._copied is None:
            self._copied = torch.cuda.Event()
        elif not self._copied.query():
            return
        else:
            self._judge(self._copy)
        self._copy.copy_(self.counts, non_blocking=True)
        self._copied.record()

    def flush(self) -> None:
        """Wait for the device, and warn of NaN. Raises UnsupportedCallError when a mask was not as expected."""
        self._judge(self.counts)

    def _judge(self, counts: Tensor) -> None:
        counted: list[int] = counts.tolist()
        masks, nan, scores = (new - old for new, old in zip(counted, self._known, strict=True))
        self._known = counted
        warn_of_nan(nan, scores)
        if masks:
            raise UnsupportedCallError(
                "graph: a decode step came with a mask that hides tokens; this cache cannot be used any more: "
                "attach with graph=False for such masks"
            )
