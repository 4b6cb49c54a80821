"""`kvpolicy calibrate`, and the commands that take what it writes."""

import json

import pytest

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


TABLES = {
    "0 1\n0 1\n": "the table must have 4 layers of 2 KV heads, as the model: it has 2 of 2",
    "0 1\n0 1\n0 2\n0 1\n": "policy duoattention: allocate.joint duo: gates must be from 0 to 1: 0 to 2",
    "0 1\n0 x\n": "gates.tsv:2:2: must be a finite number: 'x'",
}


@pytest.mark.parametrize(("content", "message"), TABLES.items(), ids=["shape", "range", "word"])
def test_a_table_that_is_none_of_the_model(fails, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gates.tsv").write_text(content)
    fails(message, "calibrate", "duoattention", "--model", "testbed", "--table", "gates.tsv")


def test_others_are_calibrated_on_a_text(fails, tmp_path, text):
    gates = tmp_path / "gates.tsv"
    gates.write_text("0 1\n" * 4)
    fails(
        "policy headkv: allocate.joint headkv: reads no table of heads: it is measured on a text",
        *("calibrate", "headkv", "--model", "testbed", "--table", gates),
    )
    for given in ((), ("--table", gates, "--text", text)):
        fails("give --text or --table, one of them", "calibrate", "headkv", "--model", "testbed", *given)


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
