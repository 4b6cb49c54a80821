"""What runs a step: asked for in words, and each step exactly once."""

import contextlib

import pytest
import torch

from kvpolicy.cache.device_faults import DeviceFaults
from kvpolicy.errors import NonFiniteScoreWarning, ParameterError, UnsupportedCallError
from kvpolicy.integrations.transformers.decode_graph.runners import Captured, Mode, mode_of


def test_what_the_user_asks_for():
    assert mode_of(False) is None
    assert mode_of(True) == Mode()
    assert mode_of("compile") == Mode("inductor")
    with pytest.raises(ParameterError, match=r"graph: must be .*: 'graph'"):
        mode_of("graph")


class Device:
    """Records what is launched while a graph is captured, and launches it at every replay, as CUDA does."""

    def __init__(self, monkeypatch, *, refuses=False):
        self.done, self.recording, self.refuses = [], None, refuses
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)

    @contextlib.contextmanager
    def capture(self, graph, pool):
        assert graph is self
        assert pool == "pool"
        self.recording = []
        try:
            yield
            if self.refuses:
                raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            self.recorded, self.recording = self.recording, None

    def launch(self, what):
        (self.done if self.recording is None else self.recording).append(what)

    def replay(self):
        self.done.extend(self.recorded)


def captured(device):
    output = torch.zeros(1)

    def step():
        device.launch("step")
        return output

    return Captured(step, "pool"), output


def test_every_call_runs_the_step_once(monkeypatch):
    device = Device(monkeypatch)
    run, output = captured(device)
    for count in range(1, 8):
        found = run()
        assert device.done == ["step"] * count
    assert found is not output  # the next replay would change it
    assert torch.equal(found, output)


def test_a_step_that_cannot_be_captured_goes_on_as_it_is(monkeypatch, caplog):
    device = Device(monkeypatch, refuses=True)
    run, _ = captured(device)
    for count in range(1, 6):
        run()
        assert device.done == ["step"] * count
    assert [record.name for record in caplog.records] == ["kvpolicy"]
    assert "not permitted" in caplog.text


def test_faults_are_told_once_each():
    faults = DeviceFaults(torch.device("cpu"))
    faults.poll()
    faults.nan.add_(torch.tensor([3, 40]))
    with pytest.warns(NonFiniteScoreWarning, match="3 of 40"):
        faults.poll()
    faults.poll()
    faults.nan.add_(torch.tensor([1, 5]))
    with pytest.warns(NonFiniteScoreWarning, match="1 of 5"):
        faults.flush()
    faults.masks.add_(1)
    with pytest.raises(UnsupportedCallError, match="graph=False"):
        faults.poll()
    faults.flush()
