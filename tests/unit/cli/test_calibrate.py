"""`kvpolicy calibrate`, and the commands that take what it writes."""

import json

import pytest

from kvpolicy.cli.quality import calibrate as calibrate_command
from kvpolicy.cli.quality import evaluate as evaluate_command
from kvpolicy.evaluate.data.texts import Text
from kvpolicy.evaluate.testbed import make_item
from kvpolicy.plan.calibration import Calibration


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(make_item("recall", 5, index, 300).prompt for index in range(3)))
    return path


def test_what_is_calibrated_can_be_run_and_planned(kv, text):
    done = kv("calibrate", "sals25", "--model", "testbed", "--text", text, "--length", 256, "--json")
    said = json.loads(done.stdout)
    assert (said["policy"], said["layers"], said["length"]) == ("sals25", 4, 256)
    ran = kv("run", "testbed", "--policy", "sals25", "--calibration", said["file"], "--prompt-file", text, "--json")
    assert json.loads(ran.stdout)["report"]["bytes_held"] > 0
    planned = kv("plan", "sals25", "--calibration", said["file"], "--json")
    assert json.loads(planned.stdout)["columns"]["keys"] == 32


def test_gates_are_taken_from_a_table(kv, tmp_path, text):
    gates = tmp_path / "gates.tsv"
    gates.write_text("0\t1\n1\t0.5\n0\t0\n1e-3\t0.25\n")
    done = kv("calibrate", "duoattention", "--model", "testbed", "--table", gates, "--json")
    said = json.loads(done.stdout)
    assert (said["policy"], said["layers"]) == ("duoattention", 4)
    assert "length" not in said
    shown = [layer["allocate.joint.importance"] for layer in Calibration.read(said["file"]).layers]
    assert [layer[:: len(layer) // 2].tolist() for layer in shown][:3] == [[0, 1], [1, 0.5], [0, 0]]
    ran = kv(
        "run", "testbed", "--policy", "duoattention", "--calibration", said["file"], "--prompt-file", text, "--json"
    )
    assert json.loads(ran.stdout)["report"]["bytes_held"] > 0


def runs_of(layers, heads):
    """As the authors of HeadKV publish importances of query heads: a list of the scores of runs for each."""
    return {f"{layer}-{head}": [layer, 0.5 * head] for layer in range(layers) for head in range(heads)}


def test_importances_of_query_heads_are_taken_from_scores_of_runs(kv, tmp_path, text):
    table = tmp_path / "heads.json"
    table.write_text(json.dumps(runs_of(4, 8)))
    said = json.loads(kv("calibrate", "headkv", "--model", "testbed", "--table", table, "--json").stdout)
    assert (said["policy"], said["layers"]) == ("headkv", 4)
    shown = [layer["allocate.joint.importance"].tolist() for layer in Calibration.read(said["file"]).layers]
    assert shown == [pytest.approx([(layer + 0.5 * head) / 6.5 for head in range(8)]) for layer in range(4)]
    ran = kv("run", "testbed", "--policy", "headkv", "--calibration", said["file"], "--prompt-file", text, "--json")
    assert json.loads(ran.stdout)["report"]["bytes_held"] > 0


RUNS = runs_of(4, 8)
KV_SHAPE = "allocate.joint duo: the table must have 4 layers of 2 KV heads, as the model: it has "
QUERY_SHAPE = "allocate.joint headkv: the table must have 4 layers of 8 query heads, as the model: it has "
TABLES = {
    "lines of another model": ("duoattention", "0 1\n0 1\n", f" policy duoattention: {KV_SHAPE}2 of 2"),
    "query heads": ("duoattention", json.dumps(RUNS), f" policy duoattention: {KV_SHAPE}4 of 8"),
    "KV heads": ("headkv", "0 1\n" * 4, f" policy headkv: {QUERY_SHAPE}4 of 2"),
    "runs of another model": ("headkv", json.dumps(runs_of(3, 8)), f" policy headkv: {QUERY_SHAPE}3 of 8"),
    "gate above 1": (
        "duoattention",
        "0 1\n0 1\n0 2\n-1 1\n",
        " policy duoattention: allocate.joint duo: gates must be from 0 to 1: layer 2, head 1 has 2",
    ),
    "negative importance": (
        "headkv",
        "0 1 2 3 4 5 6 7\n0 1 -2 3 4 5 6 7\n" * 2,
        " policy headkv: allocate.joint headkv: importances must not be negative: layer 1, head 2 has -2",
    ),
    "word": ("duoattention", "0 1\n0 x\n", "2:2: must be a finite number: 'x'"),
    "run": ("headkv", json.dumps({**RUNS, "3-0": [1, -1]}), " '3-0': run 2: must be a finite number >= 0: -1"),
}


@pytest.mark.parametrize(("policy", "content", "message"), TABLES.values(), ids=TABLES)
def test_a_table_that_is_none_of_the_model(fails, tmp_path, monkeypatch, policy, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heads.tsv").write_text(content)
    fails(f"heads.tsv:{message}", "calibrate", policy, "--model", "testbed", "--table", "heads.tsv")


def test_others_are_calibrated_on_a_text(fails, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    gates = tmp_path / "gates.tsv"
    gates.write_text("0 1\n" * 4)
    fails(
        "gates.tsv: policy sals25: store latent: reads no table of heads: it is measured on a text",
        *("calibrate", "sals25", "--model", "testbed", "--table", "gates.tsv"),
    )
    own = ("calibrate", "headkv", "--model", "testbed")
    fails("give --text or --table, one of them", *own, "--table", gates, "--text", text)
    fails("--model testbed: knows no essays; give --text or --table", *own)


def test_without_a_text_it_is_the_essays_that_no_case_is_made_from(monkeypatch):
    every = tuple(Text(str(number), f"Essay {number}.") for number in range(8))
    monkeypatch.setattr("kvpolicy.evaluate.data.texts.essays", lambda _tell: every)
    assert calibrate_command._essays("smollm2") == "Essay 6.\n\nEssay 7."
    cases, others = evaluate_command._texts("smollm2", None, calibrated=True)
    assert (cases, others) == (every[:6], every[6:])


MISSING = "needs a calibration for this model: kvpolicy calibrate"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "testbed", "--policy", "sals25"), f"store: latent {MISSING} sals25 --model MODEL --text FILE"),
        (("plan", "tada"), f"store: tada {MISSING} tada --model MODEL --text FILE"),
    ],
)
def test_a_calibration_that_is_missing(fails, text, arguments, message):
    fails(message, *arguments, *(("--prompt-file", text) if arguments[0] == "run" else ()))


def test_a_calibration_that_is_no_file(kv):
    done = kv("plan", "sals25", "--calibration", "none.st")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: none.st: cannot be read as safetensors")


@pytest.mark.parametrize(
    ("policy", "more", "message"),
    [
        ("snapkv", (), "policy snapkv needs no calibration"),
        ("sals25", ("--length", 1), "--sequences must be at least 1, --length at least 2: 16, 1"),
    ],
)
def test_what_cannot_be_calibrated(fails, text, policy, more, message):
    fails(message, "calibrate", policy, "--model", "testbed", "--text", text, *more)
