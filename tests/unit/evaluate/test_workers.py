"""Several processes measure what one does; one that ends before its time is an error that loses nothing."""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import time
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path

import attrs
import pytest

import kvpolicy
from kvpolicy.errors import EvaluationError, PolicyError
from kvpolicy.evaluate.data.texts import Text
from kvpolicy.evaluate.harness import workers
from kvpolicy.evaluate.harness.run import Evaluation, Unit
from kvpolicy.evaluate.harness.setup import Contender, EvaluationSetup
from kvpolicy.evaluate.harness.start import Inputs, evaluation_of
from kvpolicy.evaluate.harness.workers import calibrated_policies, run_here, run_in_processes
from kvpolicy.evaluate.tasks.case import TaskSizes
from kvpolicy.evaluate.testbed.vocabulary import VOCABULARY
from tests.support.building import ROOT


@pytest.fixture(scope="module")
def inputs(tiny, tmp_path_factory):
    """Two groups of a model that is saved in a folder."""
    place = tmp_path_factory.mktemp("model")
    for part in tiny:
        part.save_pretrained(place)
    texts = tuple(Text(str(start), " ".join(VOCABULARY[start : start + 200])) for start in (20, 90))
    sizes = TaskSizes(documents=2, length=128, scored=9)
    setup = EvaluationSetup((kvpolicy.load("snapkv"),), ("text",), (Fraction(1, 4),), sizes, precision=False)
    return Inputs(str(place), "cpu", None, texts, (), setup)


@pytest.fixture(scope="module")
def here(tiny, inputs):
    """The evaluation in this process, and its cells."""
    made, cells = evaluation_of(*tiny, inputs), []
    run_here(made, made.units(), cells.append)
    return made, cells


def comparable(cells):
    return sorted(
        ((cell.task, cell.group, cell.policy, cell.share, cell.values, cell.held_bytes, cell.full_bytes))
        for cell in (attrs.evolve(cell, share=cell.share or 0.0) for cell in cells)
    )


def test_two_processes_measure_what_this_one_does(inputs, here):
    made, expected = here
    found = []
    run_in_processes(inputs, made.units(), found.append, 2)

    assert len(found) == len(expected) == 4
    assert comparable(found) == comparable(expected)
    assert {cell.fitted for cell in found} == {cell.fitted for cell in expected}


def test_processes_share_calibrations_each_of_which_is_made_once(tiny, inputs, tmp_path):
    """Two policies with the same store have one calibration."""
    half = {"use": "latent", "rank": 0.5, "value_group": 8, "batch": 2}
    first, last = (kvpolicy.load("sals25", store={**half, "rank": rank}) for rank in (0.25, 0.5))
    second = attrs.evolve(first, spec=attrs.evolve(first.spec, name="second"))
    third = attrs.evolve(last, spec=attrs.evolve(last.spec, name="third"))
    setup = attrs.evolve(inputs.setup, policies=(first, second, third))
    folder = tmp_path / "calibrations"
    made, expected, found = evaluation_of(*tiny, attrs.evolve(inputs, setup=setup)), [], []
    run_here(made, made.units(), expected.append)
    run_in_processes(attrs.evolve(inputs, setup=setup, calibrations=folder), made.units(), found.append, 2)

    assert comparable(found) == comparable(expected)
    assert not any(cell.refusal for cell in found)
    assert len(calibrated_policies(made.units())) == len(list(folder.iterdir())) == 2


class Deadly:
    """A process that is sent one ends, once what it has sent has left it."""

    def __reduce__(self):
        return _end, ()


def _end():
    time.sleep(0.5)
    os._exit(3)


def test_a_process_that_ends_is_an_error_and_what_it_had_measured_is_kept(inputs, here):
    made, expected = here
    before = []
    units = [attrs.evolve(made.units()[0], contenders=(Contender(),)), Unit("text", 1, (Deadly(),))]
    with pytest.raises(EvaluationError, match="a process of the evaluation has ended") as error:
        run_in_processes(inputs, units, before.append, 1)

    assert comparable(before) == comparable(expected[:1])
    assert "\n" not in str(error.value)


def measuring(error):
    """Gives the cells of the full cache, then fails."""
    measure = Evaluation.measure

    def fails(self, unit):
        yield next(measure(self, unit))
        raise error

    return fails


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PolicyError(["budget: must be something else"]), EvaluationError),
        (ZeroDivisionError("division by zero"), ZeroDivisionError),
    ],
)
def test_a_worker_tells_its_error_and_how_many_cells_it_has_sent_before(here, monkeypatch, error, kind):
    """Errors of ours become one that can be sent to another process."""
    monkeypatch.setattr(Evaluation, "measure", measuring(error))
    sent = queue.Queue()
    monkeypatch.setattr(workers, "_process", {"evaluation": here[0], "cells": sent})
    outcome = pickle.loads(pickle.dumps(workers._measure(here[0].units()[0])))  # noqa: S301 - of our own

    assert outcome.sent == sent.qsize() == 1
    assert comparable([sent.get()]) == comparable(here[1][:1])
    assert (type(outcome.error), str(outcome.error)) == (kind, str(error))


ALONE = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from kvpolicy.evaluate.harness import workers

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), workers._begin, (None, 1, None))
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 1000).result()
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    (tmp_path / "alone.py").write_text(ALONE, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "alone.py")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        worker = int(process.stdout.readline())
        process.kill()
    until = time.monotonic() + 60
    while runs(worker) and time.monotonic() < until:
        time.sleep(0.05)

    assert not runs(worker)


def runs(pid):
    """Whether there is such a process, and it is more than what is left of one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


class Late:
    """A queue in which nothing is found at first."""

    def __init__(self, *cells, looks=3):
        self.cells, self.looks = list(cells), looks

    def get(self, timeout):
        self.looks -= 1
        if self.looks >= 0 or not self.cells:
            raise queue.Empty
        return self.cells.pop(0)


def ended(outcome):
    future = Future()
    future.set_result(outcome)
    return future


@pytest.mark.parametrize("error", [None, ZeroDivisionError("division by zero")], ids=str)
def test_cells_that_come_after_the_outcome_are_waited_for(here, error):
    """On a busy machine they take their time. Those of a unit that goes on are not taken for them."""
    first, *_, other = here[1]
    assert (first.task, first.group) != (other.task, other.group)
    futures = {ended(workers.Outcome(2, error)): Unit(first.task, first.group, ())}
    cells, added = Late(first, first), []
    if error is not None:
        futures[Future()] = Unit(other.task, other.group, ())
        cells.cells.insert(1, other)
    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        workers._collect(cells, futures, added.append)
    assert [cell for cell in added if cell is first] == [first, first]
