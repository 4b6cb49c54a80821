"""`attach(model, graph=True)`: decode steps of fixed shapes give what decode steps of any shape give."""

from pathlib import Path

import pytest
import torch

from tests.integration.static_steps import DEVICES, assert_alike, both
from tests.support.alone import repeat
from tests.support.decisions import Decisions
from tests.support.models import build, generate, model, prompt
from tests.support.oracle import masked_forward, step_by_step
from tests.support.policies import EVEN, small

ROWS = {"one": (40,), "padded": (40, 25, 31), "short": (5,), "mixed": (7, 30)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        *((name, "padded") for name in EVEN),
        *((name, rows) for name in ("h2o", "snapkv") for rows in ROWS if rows != "padded"),
    ],
)
def test_tokens_and_entries_are_the_same(name, rows, device, steps):
    """When rows are due follows from their lengths, whatever the policy."""
    tokens, mask = (one.to(device) for one in prompt(*ROWS[rows]))
    assert_alike(small(name), build().to(device), tokens, mask, count=24)
    assert len(steps) == 22  # all but the prompt's and the first


@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("name", ["h2o", "tova", "streaming_llm", "rkv"])
def test_any_rhythm_of_compressions_is_kept(name, every, steps):
    assert_alike(small(name, every=every), model(), *prompt(33, 14), count=18)
    assert len(steps) == 16


@pytest.mark.parametrize("shape", [{"num_key_value_heads": 1}, {"num_key_value_heads": 4}], ids=["MQA", "MHA"])
@pytest.mark.parametrize("name", ["gkv", "h2o"])
def test_any_number_of_heads(name, shape, steps):
    assert_alike(small(name), model(**shape), *prompt(30, 22))
    assert len(steps) == 22


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral", "phi3"])
def test_other_architectures(architecture, steps):
    assert_alike(small("snapkv"), model(architecture), *prompt(30, 22))
    assert len(steps) == 22


@pytest.mark.parametrize("name", ["snapkv", "h2o", "gkv"])
def test_half_precision(name, steps):
    one = model(dtype=torch.bfloat16)
    both(small(name), one, *prompt(30, 22), rounding=2**-5, count=18)
    assert len(steps) == 16


def test_sampling_draws_the_same_tokens(steps):
    drawn, decisions = [], Decisions()
    for graph, mode in ((False, decisions.watched), (True, decisions.followed)):
        torch.manual_seed(3)
        with small("rkv").attach(model(), graph=graph), mode():
            drawn.append(generate(model(), *prompt(30, 21), do_sample=True, num_return_sequences=2).sequences)
    assert torch.equal(*drawn)
    assert len(steps) == 22


def test_a_large_budget_changes_nothing_but_rounding(steps):
    tokens, mask = prompt(20, 11)
    plain = generate(model(), tokens, mask)
    with small("snapkv", budget=64).attach(model(), graph=True):
        repeat(plain, slice(None), model(), tokens, mask)
    assert len(steps) == 22


@pytest.mark.parametrize("name", EVEN)
def test_logits_are_those_of_the_plain_model_that_sees_what_is_held(name, steps):
    one, tokens = model(), prompt(64, 64, seed=5)[0]
    with small(name).attach(one, graph=True) as attachment:
        logits, seen = step_by_step(one, attachment.cache(), tokens, (40, *[1] * 24))
    assert len(steps) == 23  # what is held is looked at between the steps: the cache gets in 23 times
    assert torch.allclose(logits, masked_forward(one, tokens, seen), rtol=0, atol=1e-4)


def test_the_page_on_it_runs(capsys, steps):
    page = Path(__file__).parents[2] / "docs" / "how-to" / "static-shapes.md"
    block = page.read_text("utf-8").split("```python\n")[1].split("```")[0]

    exec(block, {})  # noqa: S102 our own page

    assert "policy rkv" in capsys.readouterr().out
    assert len(steps) == 30
