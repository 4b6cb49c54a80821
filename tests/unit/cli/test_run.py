"""`kvpolicy run`: text, report, and bad input before anything happens."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "note falcon gold . " + "the child walks . " * 20 + "ask falcon"


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
        (("--prompt", "falcon", "--temperature", "0"), "--temperature must be above 0; leave it out for the likeliest"),
        (("--prompt", "falcon", "--temperature", "nan"), "--temperature must be above 0; "),
        (("--prompt", "falcon", "--top-p", "1.5"), "--top-p must be above 0 and at most 1: 1.5"),
        (("--prompt", "falcon", "--top-k", "0"), "--top-k must be at least 1: 0"),
        (("--prompt", "falcon", "--seed", "7"), "--seed is for sampling: give --temperature, --top-p or --top-k, too"),
        (("--prompt", "falcon", "--top-k", "9", "--seed", "-1"), "--seed must be from 0 to"),
        (("--prompt", "falcon", "--system", "gold"), "--system: this model has no chat template"),
        (("--prompt", "falcon", "--system", "gold", "--raw"), "--system goes into the chat template"),
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


def written_by(folder, text, **options):
    """What the plain model goes on with after a text, which is given as it is."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt", **options)
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


def test_the_prompt_is_put_into_the_chat_template(kv, chat_folder):
    """With a system message and without; --raw leaves the template out."""
    words = ("run", chat_folder, "--prompt", "falcon", "--max-new-tokens", 6, "--json")
    asked, told, raw = (json.loads(kv(*words, *more).stdout)["text"] for more in ((), ("--system", "gold"), ("--raw",)))

    assert asked == written_by(chat_folder, "ask falcon .", add_special_tokens=False)
    assert told == written_by(chat_folder, "note gold . ask falcon .", add_special_tokens=False)
    assert raw == written_by(chat_folder, "falcon")
    assert len({asked, told, raw}) == 3


def test_a_template_that_refuses_is_one_line(kv, chat_folder):
    result = kv("run", chat_folder, "--prompt", "falcon", "--system", "secret")

    assert result.exit_code == 2
    assert result.stderr == (
        "error: the chat template refuses this conversation: TemplateError: no secret system messages\n"
    )


def test_sampling_among_one_token_is_greedy(kv, folder):
    words = ("run", folder, "--prompt", PROMPT, "--max-new-tokens", 8, "--json")
    texts = [
        json.loads(kv(*words, *more).stdout)["text"] for more in ((), ("--top-k", 1), ("--top-p", 1e-6, "--seed", 3))
    ]

    assert len(set(texts)) == 1


def test_a_seed_repeats_a_sample(kv, folder):
    """At a temperature at which all words are about as likely."""
    words = ("run", folder, "--prompt", PROMPT, "--max-new-tokens", 8, "--json", "--temperature", 50)
    first, again, other = (json.loads(kv(*words, "--seed", seed).stdout)["text"] for seed in (1, 1, 2))

    assert first == again != other
