"""Budgets that grow with what is generated: the prompt of each row, and a share of what comes after it."""

import math
import re

import pytest
import torch

import kvpolicy
from kvpolicy.errors import EvaluationError, PolicyError, UnsupportedCallError
from kvpolicy.plan.explain.explanation import explain
from tests.integration.test_memory import bytes_of, stepping
from tests.support.alone import assert_rows_alone
from tests.support.models import build, generate, model, prompt
from tests.support.storage import bytes_per_slot

RECENT, EVERY = 3, 6
JOINT = {"allocate": {"joint": "global"}}
PYRAMID = {"allocate": {"layers": "pyramid"}}


def growing(share="25%", **rest):
    given = {"protect": {"prompt": True, "recent": RECENT}, "compress": {"prefill": False, "every": EVERY}}
    score = [{"use": "attention", "queries": RECENT, "softmax": "candidates"}]
    return kvpolicy.load("rpc", budget=f"{share} of generated", score=score, **{**given, **rest})


def allowed(prompt_length, tokens):
    """Entries per head on average that a row may keep, by the formula of the paper."""
    return prompt_length + RECENT + math.ceil(max(0, tokens - prompt_length - RECENT) / 4)


@pytest.mark.parametrize("rest", [{}, JOINT, PYRAMID], ids=["even", "joint", "pyramid"])
@pytest.mark.parametrize("lengths", [(20,), (20, 9)], ids=["alone", "padded"])
def test_each_row_holds_its_prompt_and_a_share_of_the_rest(lengths, rest):
    """While the first tokens are generated, all; then what the budget says, and fewer than `every` entries more."""
    one, fewer = model(), 0
    with growing(**rest).attach(one) as attachment:
        cache = attachment.cache()
        layers, heads = cache.managed, cache.plan.geometry.kv_heads
        for step, _ in enumerate(stepping(one, cache, *prompt(*lengths), 60)):
            for row, length in enumerate(lengths):
                seen = length + step
                held = sum(layer.entries[row] for layer in layers) / len(layers) / heads
                most = allowed(length, seen)
                assert min(most, seen) <= held < most + EVERY
                fewer += held < seen
                for layer in layers:
                    for head in range(heads):
                        positions = set(layer.storage.positions(row, head).tolist())
                        assert {*range(length), *range(max(0, seen - RECENT), seen)} <= positions
        assert fewer > 30
        assert attachment.report().parts["entries"] == sum(map(bytes_of, layers))


def test_storage_stays_close_to_the_budget_and_grows_seldom():
    """Not with every token: each time that the budget has."""
    one, sizes = model(), set()
    with growing().attach(one) as attachment:
        cache = attachment.cache()
        for step, _ in enumerate(stepping(one, cache, *prompt(20, 9), 100)):
            limit = (allowed(20, 20 + step) + EVERY) * 2 * 2 * bytes_per_slot(cache.plan)
            assert all(bytes_of(layer) <= limit for layer in cache.managed)
            sizes.add(bytes_of(cache.managed[0]))
        capacity = cache.plan.capacity(0, 120, 20 + RECENT)
        assert capacity == allowed(20, 120) + EVERY
        assert len(sizes) < 20


def test_layers_divide_what_is_kept_of_the_generated_tokens():
    budgets = growing(**PYRAMID).compile(model().config).budgets
    counts = [budgets.entries(layer, 20 + RECENT + 80, 20 + RECENT) for layer in range(3)]

    assert counts[0] > counts[1] > counts[2] > 20 + RECENT
    assert sum(counts) == 3 * (20 + RECENT + 20)


@pytest.mark.parametrize("rest", [{}, JOINT], ids=["even", "joint"])
def test_a_row_of_a_padded_batch_equals_its_own_run(rest):
    with growing(**rest).attach(model()) as attachment:
        decisions = assert_rows_alone(model(), attachment, *prompt(30, 19, 7))
    assert decisions.repeated


def test_another_turn_counts_as_generated():
    turns = {"compress": {"prefill": True, "every": EVERY}}
    with growing(**turns).attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache()
        for start, stop in ((0, 12), (12, 40)):
            attachment.model(prompt(40)[0][:, start:stop], past_key_values=cache)
            lengths = {length for layer in cache.managed for length in layer.storage.lengths[0]}
            assert lengths == {12 if stop == 12 else allowed(12, 40)}


def test_prompts_are_known_again_in_a_cache_that_was_saved(tmp_path):
    one = model()
    with growing().attach(one) as attachment:
        first = attachment.cache()
        for _ in stepping(one, first, *prompt(20, 9), 20):
            pass
        first.save(tmp_path / "cache")
        second = attachment.load_cache(tmp_path / "cache")
        for cache in (first, second):
            token, mask = torch.full((2, 1), 5), torch.ones(2, 20 + 20 + 13, dtype=torch.int64)
            mask[1, :11] = 0
            for step in range(12):
                with torch.no_grad():
                    one(token, attention_mask=mask[:, : 41 + step], past_key_values=cache)
        assert [layer.storage.lengths for layer in first.managed] == [layer.storage.lengths for layer in second.managed]


def test_what_cannot_serve_it_is_refused_by_name():
    policy = growing()
    with pytest.raises(PolicyError, match=r"budget: graph: must not grow with the tokens: 25% of generated"):
        policy.attach(model(), graph=True)
    with policy.attach(model()), pytest.raises(UnsupportedCallError, match=r"budget: 25% of generated counts tokens"):
        generate(model(), prompt(40)[0], assistant_model=build(seed=1))
    for one in (policy, growing(compress={"prefill": True, "every": EVERY})):
        with pytest.raises(EvaluationError, match="rpc: leaves prompts as they are"):
            kvpolicy.fit(one, model(), length=100, share="25%")


def test_a_plan_says_what_it_assumes():
    told = explain(growing().compile(model().config), 103)

    assert [layer.budget for layer in told.layers] == [RECENT + 25] * len(told.layers)
    assert [layer.capacity for layer in told.layers] == [RECENT + 25 + EVERY] * len(told.layers)
    assert re.search("all of them generated", str(told))
    assert told.assumed
    assert not explain(kvpolicy.load("snapkv").compile(model().config)).assumed
