"""Presses of kvpress: the worker measures what was asked, and failures are ours."""

import stat
import sys
from types import SimpleNamespace

import attrs
import pytest
import torch

from kvpolicy.bench.baselines.peers import Request, ask, worker
from kvpolicy.errors import InputError

REQUEST = Request("FakePress", 2, 4, 2, 16, 100, 37, "float32", "cpu", 3, 1, 1)


@pytest.fixture
def fake_kvpress(monkeypatch):
    """A kvpress whose press keeps the first entries, as many as its ratio leaves."""
    seen = []

    class FakePress:
        def __init__(self, compression_ratio, **options):
            self.ratio, self.options = compression_ratio, options

        def compress(self, module, hidden, keys, values, attentions, kwargs):
            seen.append((module, hidden, keys, values, kwargs["position_embeddings"], self.options))
            kept = int(keys.shape[2] * (1 - self.ratio))
            return keys[:, :, :kept], values[:, :, :kept]

    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(FakePress=FakePress, SnapKVPress=FakePress))
    return seen


def request(**rest):
    return {**attrs.asdict(REQUEST), **rest}


def test_worker_times_every_round_but_the_warm_up(fake_kvpress):
    samples = worker.timed(request())

    assert len(samples) == 3
    assert min(samples) > 0
    assert len(fake_kvpress) == 5  # one more to see how many it keeps
    _, hidden, keys, values, turned, _ = fake_kvpress[0]
    assert keys.shape == values.shape == (2, 2, 100, 16)
    assert hidden.shape == (2, 33, 64)
    assert turned[0].shape == turned[1].shape == (1, 33, 16)


def test_worker_gives_snapkv_the_window_of_ours(fake_kvpress):
    worker.timed(request(press="SnapKVPress", dtype="bfloat16"))

    assert fake_kvpress[0][-1] == {"window_size": 32, "kernel_size": 7}
    assert fake_kvpress[0][2].dtype == torch.bfloat16


@pytest.mark.parametrize("length", [64, 100, 1152, 8192])
def test_a_press_is_told_the_ratio_that_keeps_exactly_so_many(length):
    for kept in range(1, length, max(1, length // 97)):
        assert int(length * (1 - worker.ratio_of(length, kept))) == kept


def test_a_press_that_keeps_another_number_is_an_error(fake_kvpress, monkeypatch):
    monkeypatch.setattr(worker, "ratio_of", lambda _length, _kept: 0.5)
    with pytest.raises(ValueError, match="FakePress does not keep 37 entries"):
        worker.timed(request())


def python_that(tmp_path, body):
    """An executable in place of a Python; it is given `-I worker.py` and the request on stdin."""
    file = tmp_path / "python"
    file.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_the_last_line_of_the_worker_is_the_answer(tmp_path):
    body = "print('noise')\nprint(json.dumps({'samples': [json.load(sys.stdin)['kept']], 'argv': sys.argv[1:]}))"
    found = ask(python_that(tmp_path, body), REQUEST)

    assert found["samples"] == [37]
    assert found["argv"] == ["-I", worker.__file__]


@pytest.mark.parametrize(
    ("body", "message", "seconds"),
    [
        ("raise SystemExit('no module named kvpress')", "kvpress: no module named kvpress", 60.0),
        ("sys.exit(3)", "kvpress: no output", 60.0),
        ("import time; time.sleep(60)", "kvpress: .*timed out", 1.0),
    ],
)
def test_a_worker_that_fails_is_one_line(tmp_path, body, message, seconds):
    with pytest.raises(InputError, match=message):
        ask(python_that(tmp_path, body), REQUEST, seconds=seconds)


def test_a_missing_worker_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"kvpress: .*No such file"):
        ask(tmp_path / "nowhere", REQUEST)
