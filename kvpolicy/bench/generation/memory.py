"""Peak memory of a batch."""

import gc
import resource
from typing import Self

import torch


class Memory:
    """The most bytes at one time: of all that is allocated on a GPU, of what is noted on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._noted = 0

    def __enter__(self) -> Self:
        tidy(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *_error: object) -> None:
        if self._device.type == "cuda":
            self._noted = torch.cuda.max_memory_allocated(self._device)

    def note(self, nbytes: int) -> None:
        """Tell how many bytes are held at this moment; on a CPU the peak is the largest of these."""
        self._noted = max(self._noted, nbytes)

    @property
    def peak(self) -> int:
        """Bytes, once the block has ended."""
        return self._noted

    def of_process(self) -> dict[str, int]:
        """Memory of the whole process: reserved on the GPU, or resident."""
        if self._device.type == "cuda":
            return {"reserved_bytes": torch.cuda.max_memory_reserved(self._device)}
        return {"largest_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def tidy(device: torch.device) -> None:
    """Return unused cached memory to the GPU, so that the next batch can allocate it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
