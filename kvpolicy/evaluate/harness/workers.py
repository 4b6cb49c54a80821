"""Units of an evaluation measured in this process or in several; cells come back one by one."""

import contextlib
import multiprocessing
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import attrs
import torch

from kvpolicy.errors import EvaluationError, KVPolicyError
from kvpolicy.evaluate.harness.record import Cell
from kvpolicy.evaluate.harness.run import Evaluation, Unit
from kvpolicy.evaluate.harness.start import Inputs, evaluation_of
from kvpolicy.evaluate.models import load_model
from kvpolicy.policy import Policy
from kvpolicy.spec.dump import calibrated_digest

Add = Callable[[Cell], None]

_LOOK_SECONDS = 0.2  # between two looks whether a process has ended
_ENDED = "a process of the evaluation has ended, perhaps for want of memory; the same command goes on with it"
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
            if inputs.calibrations is not None:
                _finish([pool.submit(_calibrate, policy) for policy in calibrated_policies(units)])
            _collect(cells, {pool.submit(_measure, unit): unit for unit in units}, add)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def calibrated_policies(units: Sequence[Unit]) -> list[Policy]:
    """Of the policies that are to be measured those that need a calibration, one for each that is different."""
    policies = [contender.policy for unit in units for contender in unit.contenders if contender.policy is not None]
    return list({calibrated_digest(policy.spec): policy for policy in policies if policy.spec.calibrated}.values())


def _finish(calibrations: Sequence[Future[None]]) -> None:
    """Wait until all are made. Raises EvaluationError when a process ends before its time."""
    try:
        for future in calibrations:
            future.result()
    except BrokenProcessPool as error:
        raise EvaluationError(_ENDED) from error


@attrs.frozen
class Outcome:
    """What a worker says of a unit at its end: how many cells it has sent, and the error that ended it."""

    sent: int
    error: Exception | None = None


def _collect(cells: "multiprocessing.Queue[Cell]", futures: Mapping[Future[Outcome], Unit], add: Add) -> None:
    """Add cells until all units are done, or one has failed, and all cells that these have sent have arrived.

    Cells come by a way of their own, so they may arrive after the outcome.
    """
    received: Counter[tuple[str, int]] = Counter()
    while True:
        done = {future: unit for future, unit in futures.items() if future.done()}
        ended = next((error for future in done if (error := future.exception()) is not None), None)
        if ended is None:
            outcomes = {(unit.task, unit.group): future.result() for future, unit in done.items()}
            failed = next((outcome.error for outcome in outcomes.values() if outcome.error is not None), None)
            if all(received[unit] == outcome.sent for unit, outcome in outcomes.items()):
                if failed is not None:
                    raise failed
                if len(done) == len(futures):
                    return
        try:
            cell = cells.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            if isinstance(ended, BrokenProcessPool):
                raise EvaluationError(_ENDED) from ended
            if ended is not None:
                raise ended from None
        else:
            add(cell)
            received[cell.task, cell.group] += 1


def _begin(inputs: Inputs, threads: int, cells: Any) -> None:
    """Make a worker ready, which does not outlive this process, also if that is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _process.update(inputs=inputs, cells=cells)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _evaluation() -> Evaluation:
    """That of this worker."""
    if "evaluation" not in _process:
        inputs: Inputs = _process["inputs"]
        model, tokenizer = load_model(inputs.model, torch.device(inputs.device), inputs.dtype)
        _process["evaluation"] = evaluation_of(model, tokenizer, inputs)
    made: Evaluation = _process["evaluation"]
    return made


def _calibrate(policy: Policy) -> None:
    """Make the calibration of a policy and leave it where all workers find it; what hinders that, its cells say."""
    with contextlib.suppress(KVPolicyError, MemoryError, RuntimeError):
        _evaluation().calibrations.of(policy)


def _measure(unit: Unit) -> Outcome:
    """Measure a unit in a worker, whose cells are sent one by one."""
    sent = 0
    try:
        for cell in _evaluation().measure(unit):
            _process["cells"].put(cell)
            sent += 1
    except KVPolicyError as error:
        return Outcome(sent, EvaluationError(str(error)))  # some errors of ours cannot be sent to another process
    except Exception as error:  # noqa: BLE001 it is raised in the other process
        return Outcome(sent, error)
    return Outcome(sent)
