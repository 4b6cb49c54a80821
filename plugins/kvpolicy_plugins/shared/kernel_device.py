"""Whether plugins use Triton kernels on a device."""

import torch

from kvpolicy_kernels import unavailable_reason


def runs_kernels(device: torch.device) -> bool:
    """Whether kernels run on `device`. It must be the current device, because Triton launches there."""
    current = device.type == "cuda" and device.index in (None, torch.cuda.current_device())
    return current and not unavailable_reason(device)
