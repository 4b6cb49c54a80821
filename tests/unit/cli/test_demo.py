"""`kvpolicy demo --quick` from end to end, and bad input before anything is written."""

import json
from importlib.resources import files

import pytest

from kvpolicy.evaluate.report import plots
from kvpolicy.evaluate.testbed import EVALUATED

trained = pytest.mark.skipif(
    not (files("kvpolicy.evaluate.testbed") / "weights" / "model.safetensors").is_file(), reason="no testbed weights"
)
QUICK = ("demo", "--quick", "--policy", "snapkv", "--policy", "streaming_llm")


@trained
def test_quick_demo_writes_pictures_results_and_a_table(kv, tmp_path):
    """The whole way on the embedded model."""
    result = kv(*QUICK, "--out", "there/results", "--share", "25%", "--share", "12.5%")
    folder = tmp_path / "there" / "results"

    assert result.exit_code == 0, result.stderr
    assert {path.name for path in folder.iterdir()} == {"retention.png", "tradeoff.png", "results.json"}
    for expected in ("full cache", "snapkv 25%", "streaming_llm 12.5%", *EVALUATED, "KV held", "tok/s"):
        assert expected in result.stdout
    data = json.loads((folder / "results.json").read_text())
    assert len(data["outcomes"]) == 3 * 5
    assert all(one["held_share"] <= one["share"] for one in data["outcomes"])
    assert {one["policy"] for one in data["retention"]["policies"]} == {"snapkv", "streaming_llm"}


@trained
def test_without_matplotlib_the_numbers_are_still_written(kv, tmp_path, monkeypatch):
    """One line says what is missing."""
    monkeypatch.setattr(plots, "find_spec", lambda _name: None)
    result = kv(*QUICK, "--share", "25%", "--json")

    assert result.exit_code == 0, result.stderr
    assert "pip install 'kvpolicy[plots]'" in result.stderr
    assert [path.name for path in (tmp_path / "demo-results").iterdir()] == ["results.json"]
    assert json.loads(result.stdout)["setup"]["items_per_task"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--policy", "nope"), "unknown policy 'nope'"),
        (("--policy", "full"), "leave the policy 'full' out"),
        (("--policy", "rkv", "--policy", "rkv"), "policies must have different names: rkv"),
        (("--share", "512"), "--share must be a percentage above 0% and below 100%: '512'"),
        (("--share", "100%"), "--share must be a percentage above 0% and below 100%: '100%'"),
        (("--question", "maybe"), "question must be one of seen, unseen: 'maybe'"),
        (("--items", "0"), "items must be at least 1: 0"),
        (("--length", "5"), "length must be from 128 to 2048: 5"),
        (("--seed", "-1"), "seed must be at least 0: -1"),
        (("--out", "file/below"), "--out file/below: cannot be made"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(kv, tmp_path, words, message):
    """Exit code 2 before the model is loaded."""
    (tmp_path / "file").write_text("in the way")
    result = kv("demo", *words)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
