"""`kvpolicy run`: text, report, and bad input before anything happens."""

import json

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from kvpolicy.evaluate.testbed.vocabulary import VOCABULARY
from tests.testbed_training.tokenizer import build_tokenizer

PROMPT = "note falcon gold . " + "the child walks . " * 20 + "ask falcon"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An untrained model with a tokenizer, as a folder."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=256,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def prompt(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    return file


def small_policy(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text("kvpolicy: 1\nbudget: 24\ncompress: {every: 4}\nscore:\n  - {use: attention, queries: 4}\n")
    return file


def test_text_goes_to_stdout_and_the_report_to_stderr(kv, folder, prompt, tmp_path):
    """The streamed text is what --json gives, and only that."""
    words = ("run", folder, "--policy", small_policy(tmp_path), "--prompt-file", prompt, "--max-new-tokens", 8)
    result, data = kv(*words), json.loads(kv(*words, "--json").stdout)

    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == data["text"].strip()
    assert "policy small:" in result.stderr
    assert "8 tokens in" in result.stderr
    assert data["new_tokens"] == 8
    assert data["report"]["policy"] == "small"
    assert all(24 <= layer["held"] <= 28 for layer in data["report"]["layers"])


def test_a_run_that_evicted_nothing_says_so(kv, folder, prompt):
    """It must not look as if the policy had done something."""
    result = kv("run", folder, "--policy", "snapkv", "--prompt-file", prompt, "--max-new-tokens", 3)

    assert "nothing was evicted: the sequence never outgrew the budget" in result.stderr


def test_prompt_from_option_and_stdin_are_the_same(kv, folder):
    """Three ways to give one prompt."""
    words = ("run", folder, "--max-new-tokens", 4, "--json")
    results = [kv(*words, "--prompt", PROMPT), kv(*words, input=PROMPT), kv(*words, "--prompt-file", "-", input=PROMPT)]

    assert len({json.loads(result.stdout)["text"] for result in results}) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", "falcon", "--policy", "nope"), "unknown policy 'nope'"),
        (("--prompt", "falcon", "--budget", "-5"), "override budget: must be"),
        (("--prompt", "falcon", "--device", "tpu7"), "--device must be cpu, cuda or cuda:N: 'tpu7'"),
        (("--prompt", "falcon", "--device", "cuda:99"), "--device cuda:99: this machine has"),
        (("--prompt", "falcon", "--dtype", "int8"), "--dtype must be one of"),
        (("--prompt", "falcon", "--max-new-tokens", "0"), "--max-new-tokens must be at least 1: 0"),
        (
            ("--prompt", "falcon", "--max-new-tokens", "400"),
            "prompt and new tokens are 402 together, and",
        ),
        (("--prompt", " "), "--prompt: the prompt is empty"),
        (("--prompt", "zebra"), "the prompt has words that the tokenizer does not know"),
        (("--prompt-file", "missing.txt"), "missing.txt: no such file"),
        (("--prompt", "a", "--prompt-file", "b"), "give --prompt or --prompt-file, not both"),
        ((), "stdin: the prompt is empty"),
    ],
)
def test_bad_input_is_one_line(kv, folder, words, message):
    """Exit code 2, nothing on stdout."""
    result = kv("run", folder, *words)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_prompt_file_must_be_text(kv, folder, tmp_path):
    """An empty file, and one that is not UTF-8."""
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")

    assert "empty.txt: the prompt is empty" in kv("run", folder, "--prompt-file", "empty.txt").stderr
    assert "latin.txt: must be UTF-8" in kv("run", folder, "--prompt-file", "latin.txt").stderr


def test_unsupported_models_are_refused_before_their_weights_are_read(kv, tmp_path):
    """A folder with a configuration only is enough to be refused."""
    (tmp_path / "mamba").mkdir()
    (tmp_path / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    result = kv("run", "mamba", "--prompt", "hello")

    assert result.exit_code == 2
    assert "mamba cannot carry a policy" in result.stderr
