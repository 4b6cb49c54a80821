"""How a step is run: as it stands, compiled, or captured as a CUDA graph."""

import logging
import types
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError, shown
from kvpolicy.integrations.transformers.decode_graph.decode_step import Step

_logger = logging.getLogger("kvpolicy")
_WARM_UPS = 2  # real steps before one is captured: libraries set themselves up, kernels are compiled

Run = Callable[[], Tensor]


@attrs.frozen
class Mode:
    """What takes over the steps. On a GPU they are captured as graphs in either case."""

    backend: str | None = None  # of torch.compile; None = not compiled


def mode_of(graph: object) -> Mode | None:
    """What the user asks for: nothing, steps as graphs, or "compile". Raises ParameterError for anything else."""
    if graph is False or graph is None:
        return None
    if graph is True:
        return Mode()
    if graph != "compile":
        raise ParameterError(f'graph: must be true, false or "compile": {shown(graph)}')
    return Mode("inductor")


def runner(step: Step, mode: Mode, pool: Any) -> Run:
    """What runs `step`; `pool` is the memory pool of its graph, shared with other steps of the same session."""
    run = step if mode.backend is None else Compiled(step, mode.backend)
    return Captured(run, pool) if step.inputs.tokens.is_cuda else run


class Compiled:
    """A step as one graph of `torch.compile`. Where that cannot be had it runs as it stands, and the log says why.

    Nothing has run when compiling fails, so that no step is run twice.
    """

    def __init__(self, step: Step, backend: str) -> None:
        self._step: Step = step
        self._compiled: Run | None = torch.compile(_own_code(step), backend=backend, fullgraph=True, dynamic=False)

    def __call__(self) -> Tensor:
        if self._compiled is not None:
            try:
                return self._compiled()
            except torch._dynamo.exc.TorchDynamoException as error:  # noqa: SLF001 there is no public name
                _logger.warning("the decode step is not compiled: %s", error)
                self._compiled = None
        return self._step()


def _own_code(step: Step) -> Run:
    """The step as a function whose code nobody shares: `torch.compile` counts its recompilations by code."""
    call = type(step).__call__
    own = types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__)
    return types.MethodType(own, step)


class Captured:
    """A step that becomes a CUDA graph after some real steps; every call runs it exactly once.

    Where it cannot be captured it goes on as it is, and the log says why.
    """

    def __init__(self, run: Run, pool: Any) -> None:
        self._run, self._pool = run, pool
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._runs == _WARM_UPS:
            self._capture()
        self._runs += 1
        if self._graph is None or self._logits is None:
            return self._run()
        self._graph.replay()
        return self._logits.clone()  # the next step writes to the same place

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                logits = self._run()
        except RuntimeError as error:
            _logger.warning("the decode step is not captured as a CUDA graph: %s", error)
            return
        self._graph, self._logits = graph, logits
