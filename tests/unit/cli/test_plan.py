"""`kvpolicy plan`: from a configuration alone."""

import json

import pytest
from transformers import LlamaConfig

import kvpolicy
from kvpolicy.plan.explain import explain


@pytest.fixture
def model(tmp_path):
    """A folder with a configuration and no weights."""
    folder = tmp_path / "model"
    LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, dtype="bfloat16"
    ).save_pretrained(folder)
    return folder


def test_plan_needs_no_weights(kv, model):
    """The table has budgets, bytes, steps; dtype is the configuration's own."""
    result = kv("plan", "snapkv", "--model", model, "--length", 4096)

    assert result.exit_code == 0, result.stderr
    for expected in ("one sequence of 4096 tokens, bfloat16 on cpu", "Entries per KV head", "+1 attention", "0 to 2"):
        assert expected in result.stdout


def test_json_is_the_explanation(kv, model):
    """The same numbers as from Python."""
    words = ("--model", model, "--budget", "256", "--dtype", "float32", "--length", 1000, "--json")
    data = json.loads(kv("plan", "pyramidkv", *words).stdout)
    plan = kvpolicy.load("pyramidkv", budget=256).compile(LlamaConfig.from_pretrained(model))

    assert data == json.loads(json.dumps(explain(plan, 1000).to_dict()))


def test_device_need_not_be_present(kv, model):
    """A plan for a GPU can be made on a machine without one."""
    assert "on cuda:3" in kv("plan", "rkv", "--model", model, "--device", "cuda:3").stdout


def test_testbed_is_the_default(kv):
    """The embedded model's shape."""
    assert len(json.loads(kv("plan", "rkv", "--json").stdout)["layers"]) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nope",), "unknown policy 'nope'"),
        (("rkv", "--length", "0"), "length must be at least 1 token: 0"),
        (("rkv", "--dtype", "float33"), "--dtype must be one of float32, bfloat16, float16: 'float33'; did you mean"),
        (("rkv", "--device", "tpuu"), "unknown device: 'tpuu'"),
        (("rkv", "--model", "no/such/model"), "no/such/model: its configuration cannot be read: "),
        (("rkv", "--budget", "3B"), "budget: must be at least "),
    ],
)
def test_bad_input_is_one_line(kv, words, message):
    """Each with exit code 2."""
    result = kv("plan", *words)

    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_models_that_cannot_carry_a_policy_are_refused(kv, tmp_path):
    """With the reason."""
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    result = kv("plan", "rkv", "--model", tmp_path / "t5")

    assert result.exit_code == 2
    assert "t5 cannot carry a policy: it is an encoder-decoder model" in result.stderr
