"""`kvpolicy calibrate`, and the commands that take what it writes."""

import json

import pytest

from kvpolicy.evaluate.testbed import make_item


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
