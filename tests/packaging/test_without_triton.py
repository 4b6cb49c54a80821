"""Triton is optional: without it everything works in torch, and a plan says why nothing is fused."""

import json

import pytest

from tests.support.building import HIDE_TRITON, ROOT, printed, run_together

GENERATE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import kvpolicy
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8)).eval()
policy = kvpolicy.load("rkv", budget=24)
with policy.attach(model) as attachment:
    model.generate(torch.arange(40)[None], attention_mask=torch.ones(1, 40), max_new_tokens=4, pad_token_id=0)
print(max(layer.held for layer in attachment.report().layers))
"""
PLAN = """
from kvpolicy.cli import main
sys.argv = ["kvpolicy", "plan", "rkv", "--device", DEVICE, "--json"]
main()
"""
TILES = """
import json
import kvpolicy
from kvpolicy.plan.compress.fusion import fusion_of
from kvpolicy.stages.registry.plugins import registry
terms = [term for name in registry().policies() for term in fusion_of(kvpolicy.load(name).spec, "").terms]
print(json.dumps({term.weighted.scorer.name: term.reason for term in terms}))
"""
IMPORT = """
import kvpolicy, kvpolicy_kernels, kvpolicy_plugins
print([name for name in sys.modules if name.partition(".")[0] == "triton"])
"""
CONFORMANCE = """
from kvpolicy.stages.conformance import check_plugin, conformance_cases
from kvpolicy_plugins.scorers.attention_free.key_norm import KeyNorm
check_plugin(KeyNorm())
print([name for name, _ in conformance_cases(KeyNorm()) if name.startswith("tile ")])
"""


PROGRAMS = {
    "import": IMPORT,  # the first: it tells what is imported before anything is used
    "generate": GENERATE,
    "plan cpu": PLAN.replace("DEVICE", "'cpu'"),
    "plan cuda": PLAN.replace("DEVICE", "'cuda'"),
    "tiles": TILES,
    "conformance": CONFORMANCE,
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What programs print in a process that cannot import Triton; a warning is an error."""
    return run_together(PROGRAMS, "-W", "error", first=HIDE_TRITON, cwd=tmp_path_factory.mktemp("without"), path=ROOT)


def test_packages_import_without_it(told):
    assert printed(told, "import").strip() == "[]"


def test_policy_compresses_without_it(told):
    held = int(float(printed(told, "generate")))

    assert 24 <= held < 24 + 128


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan_is_explained_without_it(told, device):
    explained = json.loads(printed(told, f"plan {device}"))

    assert explained["policy"] == "rkv"
    assert {step["implementation"] for step in explained["steps"]} == {"reference"}


def test_every_scorer_says_why_it_is_not_fused(told):
    reasons = json.loads(printed(told, "tiles"))

    assert {"attention", "redundancy", "key_norm"} & set(reasons)
    assert {name for name, reason in reasons.items() if not reason} == set()
    assert all("failed" not in reason for reason in reasons.values())


def test_conformance_says_that_no_tile_was_compared(told):
    assert printed(told, "conformance").strip() == "['tile is not compared with score: Triton is not installed']"
