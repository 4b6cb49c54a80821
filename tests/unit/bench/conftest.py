"""Clocks that do the work and say a time that was agreed on."""

import itertools

import pytest
import torch

from kvpolicy.bench.cases.floors import LARGE
from kvpolicy.bench.protocol.model_shapes import model_shape, random_model


class ScriptedClock:
    """Runs every call; the seconds come from a script, which repeats."""

    def __init__(self, *seconds):
        self._seconds = itertools.cycle(seconds or (1.0,))
        self.calls = 0

    def time(self, call):
        self.calls += 1
        call()
        return next(self._seconds)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    """The buffer whose copy gives the bandwidth need not leave the caches here."""
    monkeypatch.setitem(LARGE, "cpu", 2**16)


@pytest.fixture
def scripted():
    return ScriptedClock


@pytest.fixture(scope="session")
def tiny():
    """A model of the smallest shape."""
    return random_model(model_shape("tiny"), 4096, torch.device("cpu"), torch.float32)


@pytest.fixture
def left_out():
    """Collects what was not measured: a list of (what, why), callable."""

    class Collected(list):
        def __call__(self, what, why):
            self.append((what, why))

    return Collected()
