"""docs/example-plugin is a real distribution: it installs, is found, loads, compresses and passes its own tests."""

import sys

import pytest

from tests.support.building import COMMAND, HIDE_TRITON, ROOT, build, printed, run, run_together, unpack

SOURCE = ROOT / "docs" / "example-plugin"
USE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import kvpolicy

model = LlamaForCausalLM(LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8)).eval()
policy = kvpolicy.load("diverse", budget=16, protect={"recent": 4})
with policy.attach(model) as attachment:
    model.generate(torch.arange(40)[None], attention_mask=torch.ones(1, 40), max_new_tokens=4, pad_token_id=0)
print(max(layer.held for layer in attachment.report().layers))
"""
FUSED = """
import kvpolicy
from kvpolicy.plan.compress.fusion import fusion_of
print([term.reason for term in fusion_of(kvpolicy.load("diverse").spec, "").terms])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    return unpack(build("wheel", SOURCE, folder), folder)


@pytest.fixture(scope="module")
def told(installed, tmp_path_factory):
    programs = {"use": USE, "list": COMMAND.format(words=["kvpolicy", "plugins"]), "fused": FUSED}
    return run_together(programs, cwd=tmp_path_factory.mktemp("used"), path=installed, COLUMNS="200")


def test_its_policy_compresses(told):
    assert 16 <= float(printed(told, "use")) < 16 + 128


def test_its_plugin_is_listed(told):
    listing = printed(told, "list")

    assert "key_diversity" in listing
    assert "example-kvpolicy" in listing


def test_its_policy_is_fused(told):
    assert printed(told, "fused").strip() == "['', '']"


def test_it_works_without_triton(installed, tmp_path):
    """Its tile function is imported when a plan asks for it; nothing else of the distribution needs Triton."""
    told = run(sys.executable, "-W", "error", "-c", HIDE_TRITON + USE + FUSED, cwd=tmp_path, path=installed)

    held, reasons = told.splitlines()
    assert 16 <= float(held) < 16 + 128
    assert reasons == "['Triton is not installed', 'Triton is not installed']"


def test_it_passes_its_own_tests(installed, tmp_path):
    """Among them that its tile gives what its score gives: it chooses the interpreter itself where there is no GPU."""
    command = (sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(SOURCE / "tests"))

    told = run(*command, cwd=tmp_path, path=installed, TRITON_INTERPRET="", PYTEST_ADDOPTS="")

    assert " passed" in told
    assert told.count("[tile gives what score gives") == 2
