"""`kvpolicy demo --quick` from end to end, and bad input before anything is written."""

import json

import pytest

from kvpolicy.cli.quality.demo import _setup as demo_setup
from kvpolicy.evaluate.report import plots
from kvpolicy.evaluate.tasks.names import TESTBED_TASKS

QUICK = ("demo", "--quick", "--items", "1", "--policy", "snapkv", "--policy", "streaming_llm")


def test_a_quick_demo_writes_pictures_results_and_a_table(kv, tmp_path):
    """The whole way on the embedded model; what an earlier one left in the folder does not count."""
    folder = tmp_path / "there" / "results"
    folder.mkdir(parents=True)
    (folder / "demo.jsonl").write_text("of an earlier run\n")
    result = kv(*QUICK, "--policy", "kivi2", "--out", "there/results", "--share", "25%")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in folder.iterdir()} == {
        *("demo.jsonl", "results.json", "retention.png", "tradeoff.png"),
    }
    for word in ("full cache", "snapkv 25%", "streaming_llm 25%", *TESTBED_TASKS, "held"):
        assert word in result.stdout
    data = json.loads((folder / "results.json").read_text())
    assert set(data["tasks"]) == set(TESTBED_TASKS)
    for task in data["tasks"].values():
        assert [line["policy"] for line in task["lines"]] == ["full cache", "kivi2", "snapkv", "streaming_llm"]
        assert task["cases"] == 1
        assert all(line["held_share"] <= line["share"] for line in task["lines"] if line["share"])
    cells = list(map(json.loads, (folder / "demo.jsonl").read_text().splitlines()))
    assert cells[0]["sizes"]["seed"] == 1
    assert len(cells) == 1 + 3 * 4
    kept = data["retention"]
    assert {one["policy"] for one in kept["policies"]} == {"snapkv", "streaming_llm", "kivi2"}
    for one in kept["policies"]:
        assert {len(row) for row in one["held_by_layer_and_token"]} == {len(kept["tokens"])}
    assert any(kept["answer_follows_from"])


def test_without_matplotlib_the_numbers_are_still_written(kv, tmp_path, monkeypatch):
    """One line says what is missing; stdout is JSON alone."""
    monkeypatch.setattr(plots, "find_spec", lambda _name: None)
    monkeypatch.setattr("kvpolicy.evaluate.tasks.names.TESTBED_TASKS", ("recall",))
    result = kv("demo", "--quick", "--items", "1", "--policy", "streaming_llm", "--share", "25%", "--json")

    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("pip install 'kvpolicy[plots]'") == 1
    assert sorted(path.name for path in (tmp_path / "demo-results").iterdir()) == ["demo.jsonl", "results.json"]
    data = json.loads(result.stdout)
    assert list(data["tasks"]) == ["recall"]
    assert data["sizes"]["documents"] == 1
    assert data == json.loads((tmp_path / "demo-results" / "results.json").read_text())


def test_a_real_model_is_shown_its_best_policies_on_what_it_can_answer():
    setup = demo_setup("smollm2", None, ["25%"], None, None, 1, quick=False)
    assert setup.tasks == ("text", "needle", "needle-unseen")
    assert {"snapkv", "headkv_centred"} < {policy.name for policy in setup.policies}
    assert (setup.sizes.documents, setup.sizes.length, setup.times) == (3, 2048, True)
    assert [policy.name for policy in demo_setup("smollm2", ["rkv"], ["25%"], 1, 512, 1, quick=True).policies] == [
        "rkv"
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--policy", "nope"), "unknown policy 'nope'"),
        (("--policy", "full"), "leave the policy 'full' out"),
        (("--policy", "rkv", "--policy", "rkv"), "policies must have different names: rkv"),
        (("--share", "512"), "--share must be a percentage above 0% and below 100%: '512'"),
        (("--share", "100%"), "--share must be a percentage above 0% and below 100%: '100%'"),
        (("--items", "0"), "documents must be at least 1: 0"),
        (("--length", "5"), "length must be from 128 to 2048: 5"),
        (("--seed", "-1"), "seed must be at least 0: -1"),
        (("--model", "./nowhere"), "./nowhere: its configuration cannot be read"),
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
