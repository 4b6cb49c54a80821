"""`kvpolicy evaluate --quick` from end to end, how it goes on, and bad input before anything is measured."""

import json

import attrs
import pytest

from kvpolicy.evaluate.harness.calibrations import Calibrations
from kvpolicy.evaluate.harness.measure import GroupRun
from kvpolicy.evaluate.harness.record import RecordFile
from kvpolicy.evaluate.peers import PEERS
from kvpolicy.evaluate.report import plots
from kvpolicy.evaluate.tasks.names import TASKS
from tests.support.evaluation_records import two_tasks

QUICK = ("evaluate", "--quick", "--task", "recall", "--policy", "streaming_llm", "--policy", "kivi4", "--share", "25%")
FILES = {"cells.jsonl", "evaluation.md", "tradeoff.png"}
CONTENDERS = ["full cache", "kivi4", "streaming_llm"]


def cells_of(folder):
    head, *cells = map(json.loads, (folder / "cells.jsonl").read_text().splitlines())
    return head, cells


def test_a_quick_evaluation_writes_its_files_goes_on_and_is_rendered_again(kv, tmp_path, monkeypatch):
    """The whole way on the embedded model."""
    folder = tmp_path / "there" / "run"
    result = kv(*QUICK, "--out", "there/run")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in folder.iterdir()} == FILES
    head, cells = cells_of(folder)
    assert [cell["policy"] for cell in cells] == CONTENDERS
    assert cells[0]["values"] == {"correct": [1.0], "prefix": [1.0]}
    assert cells[2]["held_bytes"] <= cells[2]["full_bytes"] / 4
    assert (head["model"]["name"], head["model"]["dtype"]) == ("testbed", "bfloat16")
    for word in (*CONTENDERS, "recall", "testbed, bfloat16"):
        assert word in result.stdout
    page = (folder / "evaluation.md").read_text()
    assert "| full cache | 100.0% | 100% | 100% |" in page
    assert result.stderr == "written to there/run: cells.jsonl, evaluation.md, tradeoff.png\n"

    # Cut off, it measures what is missing; whole, nothing.
    lines = (folder / "cells.jsonl").read_bytes()
    (folder / "cells.jsonl").write_bytes(lines[:-5])
    assert kv(*QUICK, "--out", "there/run").exit_code == 0
    assert [(cell["policy"], cell["values"]) for cell in cells_of(folder)[1]] == [
        (cell["policy"], cell["values"]) for cell in cells
    ]
    monkeypatch.setattr(GroupRun, "full", lambda _self: 1 / 0)
    assert kv(*QUICK, "--out", "there/run").exit_code == 0

    # Other settings are another run.
    whole = (folder / "cells.jsonl").read_bytes()
    other = kv(*QUICK, "--seed", "2", "--out", "there/run")
    assert other.exit_code == 2
    assert "is the record of another run (sizes differ)" in other.stderr
    assert len(other.stderr.splitlines()) == 1
    assert (folder / "cells.jsonl").read_bytes() == whole


def test_calibrations_stay_until_all_is_measured(kv, tmp_path, monkeypatch):
    """A run that goes on calibrates nothing again."""
    words = ("evaluate", "--quick", "--task", "recall", "--policy", "centred4", "--out", "run")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "add", interrupted)
        assert kv(*words).exit_code != 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"cells.jsonl", "calibrations"}

    monkeypatch.setattr(Calibrations, "_measured", None)
    assert kv(*words).exit_code == 0
    assert [cell["policy"] for cell in cells_of(tmp_path / "run")[1]] == ["full cache", "centred4"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


@pytest.fixture
def made(tmp_path):
    """A folder with a record."""
    (tmp_path / "made").mkdir()
    record = two_tasks()
    lines = [{"kind": "run", "form": 2, **record.head}]
    lines += [{"kind": "cell", **attrs.asdict(cell)} for cell in record.cells]
    (tmp_path / "made" / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "made"


def test_a_record_is_rendered_without_a_model(kv, made, monkeypatch):
    """Page, picture and table; nothing is measured, and the record stays as it is."""
    before = (made / "cells.jsonl").read_bytes()
    monkeypatch.setattr("kvpolicy.evaluate.models.load_model", lambda *_: 1 / 0)
    result = kv("evaluate", "--from", "made")

    assert result.exit_code == 0, result.stderr
    assert {path.name for path in made.iterdir()} == FILES
    assert "| good 25% | 25.0% | **83% [50%, 100%]** |" in (made / "evaluation.md").read_text()
    assert "good 12.5%" in result.stdout
    assert (made / "cells.jsonl").read_bytes() == before


def test_programs_get_json(kv, made):
    result = kv("evaluate", "--from", "made", "--json")
    data = json.loads(result.stdout)

    assert data["tasks"]["text"]["best"] == {"0.25": ["good", "bad"], "0.125": ["good"]}
    assert data["model"]["name"] == "a/model"


def test_without_matplotlib_the_numbers_are_still_written(kv, made, monkeypatch):
    """One line says what is missing, and the page has no picture."""
    monkeypatch.setattr(plots, "find_spec", lambda _name: None)
    result = kv("evaluate", "--from", "made")

    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("pip install 'kvpolicy[plots]'") == 1
    assert {path.name for path in made.iterdir()} == FILES - {"tradeoff.png"}
    assert "![" not in (made / "evaluation.md").read_text()


def test_tasks_are_listed(kv, tmp_path):
    """All of them, each with what it is; nothing is measured."""
    result = kv("evaluate", "--task", "list")
    listed = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())

    assert result.exit_code == 0
    assert listed.pop("gym:NAME").startswith("questions of a generator of reasoning-gym")
    assert listed == {name: task.summary for name, task in TASKS.items()}
    assert list(tmp_path.iterdir()) == []


def test_peers_are_listed(kv, tmp_path):
    result = kv("evaluate", "--peer", "list")
    listed = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())

    assert result.exit_code == 0
    assert listed == {name: f"{peer.library}: {peer.summary}" for name, peer in PEERS.items()}
    assert list(tmp_path.iterdir()) == []


def test_peers_that_are_not_installed_are_told_first(kv, tmp_path, monkeypatch):
    monkeypatch.setenv("KVPOLICY_PEERS", str(tmp_path / "none"))
    result = kv("evaluate", "--peer", "snapkv")

    assert result.exit_code == 2
    assert result.stderr == "error: --peer: kvpress is not installed: kvpolicy bench peers install\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--policy", "nope"), "unknown policy 'nope'"),
        (("--policy", f"rkv+merge={'x' * 300}"), "override merge: "),
        (("--policy", "rkv", "--policy", "rkv"), "policies must have different names: rkv"),
        (("--share", "512"), "--share must be a percentage above 0% and below 100%: '512'"),
        (("--share", "25%", "--share", "25.0%"), "shares must be different: 25%, 25%"),
        (("--share", "12.5%, 25%,25.0%"), "shares must be different: 12.5%, 25%, 25%"),
        (("--share", "25%,"), "--share must be a percentage above 0% and below 100%: ''"),
        (("--task", "recall,recal"), "task: unknown: 'recal'"),
        (("--task", "recal"), "task: unknown: 'recal'"),
        (("--task", "needle"), "task: needle is for models that read text"),
        (("--model", "smollm2", "--task", "recall"), "task: recall is for the embedded model"),
        (("--documents", "0"), "documents must be at least 1: 0"),
        (("--questions", "0"), "questions must be at least 1: 0"),
        (("--scored", "1"), "scored must be at least 2: 1"),
        (("--length", "5"), "length must be from 128 to 2048: 5"),
        (("--seed", "-1"), "seed must be at least 0: -1"),
        (("--peer", "snapvk"), "--peer: unknown: 'snapvk'"),
        (("--jobs", "0"), "--jobs must be at least 1: 0"),
        (("--device", "abacus"), "--device must be cpu, cuda or cuda:N: 'abacus'"),
        (("--dtype", "float8"), "--dtype must be one of"),
        (("--model", "./nowhere"), "./nowhere: its configuration cannot be read"),
        (("--text", "file"), "--text: the embedded model knows no words but its own"),
        (("--model", "smollm2", "--text", "nowhere.txt"), "nowhere.txt: "),
        (("--out", "file/below"), "--out file/below: cannot be made"),
        (("--from", "nowhere"), "nowhere/cells.jsonl: cannot be read: No such file"),
        (("--from", "file"), "file/cells.jsonl: cannot be read: Not a directory"),
        (("--from", "other"), "other/cells.jsonl: is not a record of kvpolicy evaluate: "),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(kv, tmp_path, words, message):
    """Exit code 2 before a model or a text is fetched."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cells.jsonl").write_text('{"a": 1}\n')
    result = kv("evaluate", *words)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["cells.jsonl"]
