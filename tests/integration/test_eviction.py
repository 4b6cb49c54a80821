"""With eviction, an attached model computes what the plain model computes when it sees the held entries only."""

import pytest
import torch

from tests.support.models import ARCHITECTURES, SEED, VOCABULARY, model
from tests.support.oracle import masked_forward, step_by_step
from tests.support.policies import NAMES, held, small

PROMPT, STEPS = 40, 24
DECODING = (PROMPT, *[1] * STEPS)


def tokens_of(batch, seed=0):
    return torch.randint(1, VOCABULARY, (batch, PROMPT + STEPS), generator=torch.Generator().manual_seed(SEED + seed))


def assert_as_if_masked(policy, one, sizes, batch=2):
    tokens = tokens_of(batch)
    with policy.attach(one) as attachment:
        logits, seen = step_by_step(one, attachment.cache(), tokens, sizes)
    expected = masked_forward(one, tokens, seen)
    assert any(not sees.equal(torch.ones_like(sees).tril()) for sees in seen.values()), "nothing was evicted"
    assert torch.allclose(logits, expected, rtol=0, atol=1e-4), (logits - expected).abs().max()


@pytest.mark.parametrize("budget", [8, 12, 16])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_plain_model_that_sees_what_is_held(name, budget):
    assert_as_if_masked(small(name, budget), model(), DECODING)


@pytest.mark.parametrize("name", ["h2o", "pyramidkv", "adakv"])
@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_logits_follow_what_is_held_in_every_architecture(architecture, name):
    assert_as_if_masked(small(name), model(architecture), DECODING)


@pytest.mark.parametrize("name", ["snapkv", "streaming_llm", "gkv", "adakv", "pyramidkv"])
@pytest.mark.parametrize("sizes", [(10, 15, 15, 1, 1, 7, 1, 14), (1,) * 64, (64,)], ids=["chunks", "single", "whole"])
def test_logits_follow_what_is_held_however_the_tokens_come(name, sizes):
    if sizes == (64,):  # one forward is over before anything is evicted
        sizes = (63, 1)
    assert_as_if_masked(small(name), model(), sizes)


@pytest.mark.parametrize("shape", [{"num_key_value_heads": 1}, {"num_key_value_heads": 4}], ids=["MQA", "MHA"])
@pytest.mark.parametrize("name", ["rkv", "adakv"])
def test_logits_follow_what_is_held_for_any_number_of_heads(name, shape):
    assert_as_if_masked(small(name), model(**shape), DECODING)


@pytest.mark.parametrize("name", NAMES)
def test_sinks_and_recent_tokens_stay_and_nothing_is_held_twice(name):
    one = model()
    with small(name, protect={"sinks": 2, "recent": 3}).attach(one) as attachment:
        cache = attachment.cache()
        step_by_step(one, cache, tokens_of(1), DECODING)
        last = PROMPT + STEPS - 1
        for heads in held(cache):
            for positions in heads[0]:
                assert positions == sorted(set(positions))
                assert set(positions) >= {0, 1, last - 2, last - 1, last}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_run_holds_the_same_entries(name):
    one = model()
    with small(name).attach(one) as attachment:
        runs = [attachment.cache() for _ in range(2)]
        for cache in runs:
            step_by_step(one, cache, tokens_of(2), DECODING)
    assert held(runs[0]) == held(runs[1])
