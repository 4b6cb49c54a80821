"""All parts within a time, on a CPU at tiny sizes; and the tests of the kernels in a checkout."""

import attrs
import pytest
import torch

from kvpolicy.bench import gpu
from kvpolicy.bench.baselines.contenders import COMPILED, DYNAMIC
from kvpolicy.bench.cases.compress import NAIVE
from kvpolicy.bench.gpu import goals, measure, setup_for
from kvpolicy.bench.protocol.case import AGAIN, OURS, Case
from kvpolicy.bench.protocol.correctness import kernel_tests
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.result import Result, read_result
from kvpolicy.bench.sizes import CPU, GPU, TINY, sizes_for
from kvpolicy.errors import InputError

PARTS = ("correctness", "attention", "compress", "decode", "generate")
HERE = {"versions": {}, "machine": {}}


@pytest.fixture
def setup():
    made = setup_for(TINY, 64, torch.device("cpu"), torch.float32, graph=False)
    return attrs.evolve(made, tests=lambda seconds: {"ran": True, "seconds": seconds})


def run(setup, clock, result, deadline=None, only=PARTS):
    return list(measure(setup, clock, deadline or Deadline(), result, only))


def test_all_parts_are_written_as_they_are_found(setup, scripted, tmp_path):
    result = Result("gpu", {}, HERE, file=tmp_path / "gpu.json")
    steps = run(setup, scripted(1.0), result)
    found = read_result(tmp_path / "gpu.json")

    assert list(found.parts) == ["attention", "compress", "decode", "generate"]
    assert [case.what for case in found.parts["compress"]] == list(gpu.COMPRESSED)
    assert [case.what for case in found.parts["generate"]] == ["snapkv", "rkv"]
    assert found.facts["kernel tests"]["ran"]
    assert [case.what for case in found.parts["attention"]] == list(gpu.ATTENDED)
    assert found.facts["goals"] == []  # there is none at such sizes
    assert len(steps) == setup.steps
    assert found.left_out == []


def test_without_time_every_part_is_left_out_by_name(setup, scripted):
    result = Result("gpu", {}, HERE)
    clock = scripted()

    assert run(setup, clock, result, Deadline(0.0, lambda: 0.0)) == []
    assert [one["what"] for one in result.left_out] == list(PARTS)
    assert clock.calls == 0


def test_only_the_parts_that_are_asked_for_are_measured(setup, scripted):
    result = Result("gpu", {}, HERE)
    run(setup, scripted(), result, only=("attention",))

    assert list(result.parts) == ["attention"]
    assert "kernel tests" not in result.facts
    assert result.left_out == []


@pytest.mark.parametrize("error", [InputError("broken"), RuntimeError("CUDA error"), torch.OutOfMemoryError("no room")])
def test_a_part_that_fails_costs_no_other(setup, scripted, monkeypatch, error):
    def fail(*_args):
        raise error

    monkeypatch.setattr(gpu.compress, "measure", fail)
    result = Result("gpu", {}, HERE)
    steps = run(setup, scripted(), result)

    assert list(result.parts) == ["attention", "decode", "generate"]
    assert result.left_out == [{"what": "compress", "why": f"{type(error).__name__}: {error}"}]
    assert "compress failed" in steps


def test_time_is_shared_out_and_some_is_held_back(setup, scripted, monkeypatch):
    """What a part leaves is there for the next ones."""
    asked = {}

    def note(part, result=()):
        def measured(*args):
            (deadline,) = (one for one in args if isinstance(one, Deadline))
            asked[part] = deadline.left
            return iter(result)

        return measured

    for part, module in (("compress", gpu.compress), ("attention", gpu.attention), ("decode", gpu.decode)):
        monkeypatch.setattr(module, "measure", note(part))
    monkeypatch.setattr(gpu.generation, "measure", note("generate"))
    run(setup, scripted(), Result("gpu", {}, HERE), Deadline(480.0, lambda: 0.0))

    assert asked == pytest.approx(
        {"compress": 0.3 * 450, "attention": 0.15 * 450, "decode": 0.45 * 450, "generate": 427.5}
    )


def test_goals_of_the_card_are_judged_from_the_cases():
    def case(what, length, **ratios):
        samples = {OURS: (1.0,) * 3, AGAIN: (1.0,) * 3, **{name: (one,) * 3 for name, one in ratios.items()}}
        return Case(what, length, samples, {"bytes": 0.7})

    result = Result("gpu", {}, HERE)
    result.parts = {
        "compress": [case("snapkv", 8192), case("snapkv", 4096), case("rkv", 4096, **{NAIVE: 19.0})],
        "attention": [case("snapkv", 8192), case("snapkv", 1024)],
        "generate": [case("rkv", 16_512, **{DYNAMIC: 6.7, COMPILED: 4.9}), case("snapkv", 16_512, **{DYNAMIC: 9.0})],
    }
    found = [(one.gate, one.threshold, one.passed) for one in goals(result)]

    assert found == [
        ("floor", 0.6, True),
        ("rkv", 20.0, False),
        ("attention", 0.8, False),
        ("generate", 6.6, True),
        ("generate", 5.0, False),
    ]


def test_a_gpu_gets_its_own_sizes():
    assert sizes_for(torch.device("cuda:1")) == GPU
    assert sizes_for(torch.device("cpu")) == CPU
    made = setup_for(GPU, 1024, torch.device("cpu"), torch.bfloat16, graph=True)
    assert made.compress.shape.layers == 32
    assert made.generate.full == (DYNAMIC, COMPILED)
    assert made.generate.policies[0].spec.budget.tokens == 1638
    assert made.generate.length == 16_512
    assert made.generate.graph
    assert made.decode.graph


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose kernel tests are the given text."""

    def write(text):
        folder = tmp_path / "tests" / "kernels"
        folder.mkdir(parents=True)
        (folder / "test_some.py").write_text(text)
        return tmp_path

    return write


def test_kernel_tests_are_counted(checkout, monkeypatch):
    """Whatever options pytest has from the shell."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-v")
    source = "def test_a(): pass\ndef test_b(): pass\ndef test_c(): assert 0, 'wrong'\n"
    found = kernel_tests(100.0, checkout(source))

    assert (found["ran"], found["finished"], found["exit_code"]) == (True, True, 1)
    assert (found["passed"], found["failed"]) == (2, 1)
    assert "wrong" in found["tail"]


def test_kernel_tests_that_take_too_long_count_as_far_as_they_got(checkout):
    source = (
        "import pytest, time\n"
        "@pytest.mark.parametrize('i', range(80))\ndef test_a(i): pass\n"
        "def test_b(): time.sleep(60)\n"
    )
    found = kernel_tests(8.0, checkout(source))

    assert (found["ran"], found["finished"], found["exit_code"]) == (True, False, None)
    assert found["failed"] == 0


def test_kernel_tests_that_cannot_run_say_why(checkout, tmp_path, monkeypatch):
    assert kernel_tests(100.0, tmp_path) == {"ran": False, "why": "this is not a checkout with tests/kernels"}
    here = checkout("def test_a(): pass\n")
    assert kernel_tests(1.0, here) == {"ran": False, "why": "no time was left"}
    monkeypatch.setattr("kvpolicy.bench.protocol.correctness.find_spec", lambda _name: None)
    assert kernel_tests(100.0, here) == {"ran": False, "why": "pytest is not installed"}
