"""`kvpolicy evaluate --quick` from end to end, and bad input before anything is measured."""

import json

import pytest

from kvpolicy.evaluate.report import plots
from kvpolicy.evaluate.testbed import EVALUATED

QUICK = ("evaluate", "--quick", "--policy", "streaming_llm", "--policy", "full", "--policy", "kivi4")


def test_quick_evaluation_writes_record_page_and_pictures(kv, tmp_path):
    """The whole way on the embedded model; a policy that is a base of the mergers brings their table."""
    result = kv(*QUICK, "--out", "there/evaluation.json", "--markdown", "page/evaluation.md")
    names = {path.name for path in (tmp_path / "there").iterdir()}

    assert result.exit_code == 0, result.stderr
    assert names == {"evaluation.json", "evaluation-accuracy.png", "evaluation-time.png"}
    record = json.loads((tmp_path / "there" / "evaluation.json").read_text())
    assert [one["policy"] for one in record["policies"]] == ["full", "kivi4", "streaming_llm", "streaming_llm"]
    assert {one["policy"] for one in record["mergers"]} == {"streaming_llm"}
    assert len(record["decode"]) == 2 * 3
    assert record["setup"]["dtype"] == "bfloat16"
    assert record["policies"][0]["tasks"]["recall"]["accuracy"] == 1.0
    page = (tmp_path / "page" / "evaluation.md").read_text()
    assert all(task in page for task in EVALUATED)
    assert result.stdout == ""

    again = kv("evaluate", "--from", "there/evaluation.json")
    assert again.exit_code == 0
    assert again.stdout == page


def test_without_matplotlib_the_numbers_are_still_written(kv, tmp_path, monkeypatch):
    """One line says what is missing."""
    monkeypatch.setattr(plots, "find_spec", lambda _name: None)
    result = kv("evaluate", "--quick", "--policy", "full", "--out", "evaluation.json")

    assert result.exit_code == 0, result.stderr
    assert "pip install 'kvpolicy[plots]'" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    assert "| full | all |" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--policy", "nope"), "unknown policy 'nope'"),
        (("--policy", "rkv", "--policy", "rkv"), "policies must have different names: rkv"),
        (("--items", "0"), "items must be at least 1: 0"),
        (("--seed", "-1"), "seed must be from 0 to"),
        (("--out", "file/below.json"), "file: cannot be made"),
        (("--markdown", "."), ".: is a folder"),
        (("--from", "nowhere.json"), "nowhere.json: no such file"),
        (("--from", "file"), "--from file: cannot be read"),
        (("--from", "other.json"), "--from other.json: is not a record of kvpolicy evaluate (form 1)"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(kv, tmp_path, words, message):
    """Exit code 2 before the model is loaded."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "other.json").write_text("{}")
    result = kv("evaluate", *words)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other.json"]
