"""Where plugins use Triton kernels."""

import torch

from kvpolicy_kernels import unavailable_reason


def runs_kernels(device: torch.device) -> bool:
    """Whether kernels run on a device: they are launched on the current one, whatever tensors they are given."""
    current = device.type == "cuda" and device.index in (None, torch.cuda.current_device())
    return current and not unavailable_reason(device)
