"""Clocks that time a call on the host or on a GPU."""

import time
from collections.abc import Callable
from typing import Protocol

import torch

Call = Callable[[], object]
_BEYOND_CACHES = 256 * 2**20  # bytes; the last-level cache of an H200 holds 60 MB


class Clock(Protocol):
    """Times one call."""

    def time(self, call: Call) -> float:
        """Seconds."""


class HostClock:
    """For work that is done when the call returns."""

    def time(self, call: Call) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started


class DeviceClock:
    """CUDA events around the call, with nothing of its data left in the device's caches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._scratch = torch.ones(_BEYOND_CACHES // 4, dtype=torch.float32, device=device)

    def time(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self._device):
            self._scratch.add_(1)
            start.record()
            call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def captured(call: Call, device: torch.device) -> Call:
    """The same work as one CUDA graph, without the time that the host takes to launch it; on a CPU the call itself."""
    if device.type != "cuda":
        return call
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()  # what is compiled or allocated at the first call is not part of the graph
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def clock_for(device: torch.device) -> Clock:
    """The clock for work on a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()
