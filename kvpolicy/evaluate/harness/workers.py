"""Units of an evaluation measured in this process or in several; cells come back one by one."""

import multiprocessing
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from kvpolicy.errors import EvaluationError, KVPolicyError
from kvpolicy.evaluate.harness.record import Cell
from kvpolicy.evaluate.harness.run import Evaluation, Unit
from kvpolicy.evaluate.harness.start import Inputs, evaluation_of
from kvpolicy.evaluate.models import load_model

Add = Callable[[Cell], None]

_LOOK_SECONDS = 0.2  # between two looks whether a process has ended
_process: dict[str, Any] = {}  # of a worker: its evaluation, and where cells go


def run_here(evaluation: Evaluation, units: Sequence[Unit], add: Add) -> None:
    """Measure units one after another in this process."""
    try:
        for unit in units:
            for cell in evaluation.measure(unit):
                add(cell)
    finally:
        evaluation.close()


def run_in_processes(inputs: Inputs, units: Sequence[Unit], add: Add, jobs: int) -> None:
    """Measure units in `jobs` processes, each with a copy of the model and its part of the threads.

    `add` is called in this process. Raises EvaluationError when a process ends before its time; what was measured
    until then has been added.
    """
    context = multiprocessing.get_context("spawn")
    cells = context.Queue()
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, context, _begin, (inputs, threads, cells)) as pool:
        try:
            futures = [pool.submit(_measure, unit) for unit in units]
            _collect(cells, futures, add)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _collect(cells: "multiprocessing.Queue[Cell]", futures: Sequence[Future[int]], add: Add) -> None:
    """Add cells until all units are done, or one has failed, and all cells that were sent have arrived."""
    received = 0
    while True:
        done = [future for future in futures if future.done()]
        failed = next((error for future in done if (error := future.exception()) is not None), None)
        everything = failed is None and len(done) == len(futures)
        if everything and received == sum(future.result() for future in done):
            return
        try:
            add(cells.get(timeout=_LOOK_SECONDS))
            received += 1
        except queue.Empty:
            if isinstance(failed, BrokenProcessPool):
                raise EvaluationError(
                    "a process of the evaluation has ended, perhaps for want of memory; the same command goes on "
                    "with it"
                ) from failed
            if failed is not None:
                raise failed from None


def _begin(inputs: Inputs, threads: int, cells: Any) -> None:
    """Make a worker ready."""
    torch.set_num_threads(threads)
    _process.update(inputs=inputs, cells=cells)


def _measure(unit: Unit) -> int:
    """Measure a unit in a worker; returns how many cells have been sent."""
    try:
        if "evaluation" not in _process:
            inputs: Inputs = _process["inputs"]
            model, tokenizer = load_model(inputs.model, torch.device(inputs.device), inputs.dtype)
            _process["evaluation"] = evaluation_of(model, tokenizer, inputs)
        count = 0
        for cell in _process["evaluation"].measure(unit):
            _process["cells"].put(cell)
            count += 1
    except KVPolicyError as error:
        raise EvaluationError(str(error)) from error  # some errors of ours cannot be sent to another process
    return count
