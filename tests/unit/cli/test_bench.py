"""`kvpolicy bench` at tiny sizes: what it writes, what it prints, how it fails."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from kvpolicy.bench import gates
from kvpolicy.bench.cases.floors import LARGE
from kvpolicy.bench.protocol.case import OURS
from kvpolicy.bench.report.verdict import Verdict
from kvpolicy.cli.app import app
from kvpolicy.errors import InputError
from kvpolicy.evaluate.report import plots


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    """The buffer whose copy gives the bandwidth need not leave the caches here."""
    monkeypatch.setitem(LARGE, "cpu", 2**16)


COMPRESS = ("bench", "compress", "--policy", "rkv", "--length", "64", "--budget", "24", "--heads", "4,2,16")
DECODE = ("bench", "decode", "--policy", "rkv", "--model", "tiny", "--length", "64", "--budget", "24", "--rounds", "3")
GENERATE = ("bench", "generate", "--policy", "rkv", "--model", "tiny", "--budget", "24", "--memory", "300KiB")


def record(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_compress_writes_record_table_and_picture(kv, tmp_path):
    before = torch.get_num_threads()
    result = kv(*COMPRESS, "--rounds", "3", "--seed", "5", "--out", "there", "--threads", "2")
    found = record(tmp_path / "there", "compress")

    assert result.exit_code == 0, result.stderr
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"compress.json", "compress.md", "compress.png"}
    assert found["options"]["seed"] == 5
    assert found["machine"]["threads"] == 2
    assert torch.get_num_threads() == before
    assert [len(samples) for samples in found["parts"]["compress"][0]["samples"].values()] == [3, 3, 3]
    assert {"torch", "transformers", "triton", "python"} <= set(found["versions"])
    assert {"processor", "threads", "cores", "gpu"} <= set(found["machine"])
    assert "naive torch" in result.stdout
    assert "written to there: compress.json, compress.md, compress.png" in result.stderr


def test_shipped_policies_that_cannot_keep_so_few_are_named(kv):
    result = kv("bench", "compress", "--length", "64", "--budget", "24", "--heads", "4,2,16", "--rounds", "3")

    assert result.exit_code == 0, result.stderr
    assert "not measured: snapkv: " in result.stderr
    assert "gkv" in result.stdout
    assert "h2o" in result.stdout
    assert "snapkv" not in result.stdout


def test_decode_measures_attaching_and_old_sequences_too(kv, tmp_path):
    result = kv(*DECODE, "--long", "--threads", "1")
    found = record(tmp_path / "bench-results", "decode")

    assert result.exit_code == 0, result.stderr
    assert list(found["parts"]) == ["decode", "attached without evicting", "after many tokens"]
    assert set(found["parts"]["decode"][0]["samples"]) == {
        OURS, "ours again", "DynamicCache", "preallocated", "StaticCache",
    }  # fmt: skip
    assert found["parts"]["after many tokens"][0]["shape"] == {"young": 48, "old": 1200}


@pytest.mark.parametrize(("points", "how"), [("0", "every token generated"), ("2", "steps at 2 lengths")])
def test_generate_fills_the_memory(kv, tmp_path, points, how):
    result = kv(*GENERATE, "--prompt", "10", "--new", "80", "--points", points)
    (case,) = record(tmp_path / "bench-results", "generate")["parts"]["generate"]

    assert result.exit_code == 0, result.stderr
    assert case["facts"]["how"] == how
    assert case["facts"]["rows"]["DynamicCache"] == 300 * 1024 // (90 * 512)


def test_gpu_runs_all_parts_at_tiny_sizes(kv, tmp_path, monkeypatch):
    monkeypatch.setattr("kvpolicy.bench.protocol.correctness.find_spec", lambda _name: None)
    result = kv("bench", "gpu", "--quick", "--device", "cpu", "--budget", "64", "--name", "some", "--out", ".")
    (file,) = tmp_path.glob("gpu-*-some.json")

    assert result.exit_code == 0, result.stderr
    found = json.loads(file.read_text())
    assert list(found["parts"]) == ["attention", "compress", "decode", "generate"]
    assert found["facts"]["kernel tests"] == {"ran": False, "why": "pytest is not installed"}
    assert "library attention" in result.stdout


def gate(passes):
    return {"fast": lambda _scale, _clock: ([Verdict("fast", "is fast", 2.0, 1.0 if passes else 3.0)], [])}


@pytest.mark.parametrize(("passes", "code", "word"), [(True, 0, "pass"), (False, 1, "FAIL")])
def test_gates_exit_with_one_when_one_fails(kv, tmp_path, monkeypatch, passes, code, word):
    monkeypatch.setattr(gates, "GATES", gate(passes))
    result = kv("bench", "gates")

    assert result.exit_code == code
    assert f"{word}  fast: 2 (at least {1 if passes else 3})  is fast" in result.stdout
    assert record(tmp_path / "bench-results", "gates")["facts"]["gates"][0]["passed"] is passes


def test_quick_gates_run(kv, tmp_path):
    result = kv("bench", "gates", "--quick", "--gate", "snapkv-float32", "--gate", "compaction")

    assert result.exit_code in (0, 1), result.stderr
    assert set(record(tmp_path / "bench-results", "gates")["parts"]) == {"snapkv-float32", "compaction"}


def test_without_matplotlib_the_numbers_are_still_written(kv, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda _name: None)
    result = kv(*COMPRESS, "--rounds", "3", "--out", ".")

    assert result.exit_code == 0, result.stderr
    assert "pip install 'kvpolicy[plots]'" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"compress.json", "compress.md"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*COMPRESS, "--policy", "nope"), "unknown policy 'nope'"),
        ((*COMPRESS, "--keys", "odd"), "--keys must be one of shared, isotropic: 'odd'"),
        ((*COMPRESS, "--heads", "4,2"), "--heads must be three numbers"),
        ((*COMPRESS, "--heads", "4,3,8"), "4 query heads cannot share 3 KV heads"),
        ((*COMPRESS, "--rounds", "2"), "--rounds must be at least 3: 2"),
        ((*COMPRESS, "--rows", "0"), "--rows must be at least 1"),
        ((*COMPRESS, "--seconds", "0"), "--threads and --seconds must be above 0"),
        ((*COMPRESS, "--dtype", "int8"), "--dtype must be one of"),
        ((*COMPRESS, "--device", "tpu"), "--device must be cpu, cuda or cuda:N"),
        ((*COMPRESS, "--out", "file/below"), "--out file/below: cannot be made"),
        ((*DECODE, "--model", "huge"), "--model must be one of tiny, small, 135m, 267m, 8b: 'huge'"),
        ((*GENERATE, "--memory", "lots"), "--memory must be bytes, 2GiB: 'lots'"),
        ((*GENERATE, "--new", "1"), "at least 2 new tokens"),
        (("bench", "gates", "--gate", "fats"), "--gate 'fats' is unknown"),
    ],
)
def test_bad_input_is_one_line(kv, tmp_path, words, message):
    (tmp_path / "file").write_text("in the way")
    result = kv(*words)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_module_is_the_same_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "kvpolicy.bench", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("compress", "decode", "generate", "gpu", "gates"))


PAGE = Path(__file__).parents[3] / "docs" / "reference" / "benchmarks.md"


def shown(page=PAGE):
    """Every command of the page."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("command", shown())
def test_commands_of_the_page_are_understood(command):
    """Parsed as the command line does it: names of commands and options, and the kinds of their values."""
    program, *words = shlex.split(command)
    found = typer.main.get_command(app)
    assert program == "kvpolicy"
    while True:
        context = found.make_context(program, list(words))
        if not hasattr(found, "resolve_command"):
            break
        program, found, words = found.resolve_command(context, context._protected_args + context.args)
    assert found.name in command


@pytest.mark.parametrize("command", [command for command in shown() if "--quick" in command])
def test_quick_commands_of_the_page_run(kv, tmp_path, monkeypatch, command):
    monkeypatch.setattr("kvpolicy.bench.protocol.correctness.find_spec", lambda _name: None)
    result = kv(*shlex.split(command)[1:])

    assert result.exit_code in (0, 1), result.stderr  # tiny sizes pass no gate
    assert list((tmp_path / "quick").glob("*.json"))


def test_compress_with_peers_adds_theirs(kv, tmp_path, monkeypatch):
    asked = []

    def ask(python, request):
        asked.append((python, request))
        return {"samples": [1.0] * request.rounds, "versions": {"kvpress": "9"}}

    monkeypatch.setattr("kvpolicy.peers.environment.python_of", lambda: Path("python"))
    monkeypatch.setattr("kvpolicy.bench.baselines.peers.ask", ask)
    result = kv(*COMPRESS, "--policy", "tova", "--rounds", "3", "--peers", "--out", ".", "--layers", "2")
    rkv, tova = record(tmp_path, "compress")["parts"]["compress"]

    assert result.exit_code == 0, result.stderr
    assert [(one.press, one.length, one.kept, one.rounds) for _, one in asked] == [("TOVAPress", 64, 24, 3)]
    assert tova["samples"]["kvpress, own process"] == [2.0] * 3  # of two layers
    assert tova["seconds_p50"]["kvpress, own process"] == 1.0
    assert "kvpress, own process" not in rkv["samples"]


def test_peers_that_are_not_installed_are_asked_for_before_anything_is_measured(kv, tmp_path, monkeypatch):
    monkeypatch.setenv("KVPOLICY_PEERS", str(tmp_path / "none"))
    result = kv(*COMPRESS, "--peers")

    assert result.exit_code == 2
    assert result.stderr == "error: --peers: kvpress is not installed: kvpolicy bench peers install\n"
    assert list(tmp_path.iterdir()) == []
    assert kv("bench", "peers", "show").stdout == "not installed: kvpolicy bench peers install\n"


def test_a_peer_that_fails_is_left_out(kv, tmp_path, monkeypatch):
    def ask(_python, _request):
        raise InputError("kvpress: broken")

    monkeypatch.setattr("kvpolicy.peers.environment.python_of", lambda: Path("python"))
    monkeypatch.setattr("kvpolicy.bench.baselines.peers.ask", ask)
    result = kv(*COMPRESS, "--policy", "tova", "--rounds", "3", "--peers", "--out", ".")

    assert result.exit_code == 0
    assert "not measured: kvpress for tova at 64: kvpress: broken" in result.stderr
