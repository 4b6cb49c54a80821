"""A stage that raises in the middle of a forward breaks neither the model nor what comes after."""

import pytest
import torch

from kvpolicy.errors import CacheError
from kvpolicy_plugins.allocators.adaptive import Adaptive
from kvpolicy_plugins.allocators.pyramid import Pyramid
from kvpolicy_plugins.mergers.d2o import D2O
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.selectors.topk import TopK
from tests.support import fingerprint
from tests.support.models import build, difference, generate, prompt
from tests.support.policies import small

STAGES = {
    "scorer": (Attention, "score"),
    "layer allocator": (Pyramid, "allocate"),
    "head allocator": (Adaptive, "allocate"),
    "selector": (TopK, "select"),
    "merger": (D2O, "merge"),
}
ERRORS = (ValueError, KeyboardInterrupt, torch.OutOfMemoryError)
WHEN = {"prefill, first layer": 0, "prefill, second layer": 1, "decode": 3}


class Failing:
    """Stands in for a method; raises at its n-th call."""

    def __init__(self, method, call, error):
        self.method, self.left, self.error = method, call, error

    def __get__(self, owner, _kind):
        def method(*args, **options):
            self.left -= 1
            if self.left == -1:
                raise self.error("on purpose")
            return self.method(owner, *args, **options)

        return method


def steps(one, cache, tokens, count=6):
    with torch.no_grad():
        for _ in range(count):
            one(tokens, past_key_values=cache)
            tokens = tokens[:, :1]


@pytest.mark.parametrize("call", WHEN.values(), ids=WHEN)
@pytest.mark.parametrize(("stage", "method"), STAGES.values(), ids=STAGES)
def test_after_a_stage_has_raised_all_is_well(stage, method, call, monkeypatch):
    one = build()
    tokens = prompt(40, 29)
    plain = fingerprint.of_model(one)
    allocate = {"layers": "pyramid", "heads": "adaptive"}  # the first is asked for anew as tokens come
    policy = small("adakv", budget="30%", merge={"use": "d2o"}, allocate=allocate)
    with policy.attach(one) as attachment:
        expected, attached = generate(one, *tokens), fingerprint.of_model(one)
        for error in ERRORS:
            cache = attachment.cache()
            budgets = attachment.plan.budgets  # what is known is not asked for again
            for known in (budgets._allocated, budgets._divided, budgets._ahead):
                known.clear()
            with monkeypatch.context() as patch:
                patch.setattr(stage, method, Failing(getattr(stage, method), call, error))
                with pytest.raises(error, match="on purpose"):
                    steps(one, cache, tokens[0])
            cache.check_integrity()
            assert fingerprint.of_model(one) == attached
            with pytest.raises(CacheError, match="failed"):
                steps(one, cache, tokens[0])
            assert difference(generate(one, *tokens), expected) == 0
    assert fingerprint.of_model(one) == plain


def test_an_error_in_the_generation_of_one_batch_leaves_the_next_one_exact(monkeypatch):
    one = build()
    tokens = prompt(40)
    with small("snapkv").attach(one):
        expected = generate(one, *tokens)
        with monkeypatch.context() as patch:
            patch.setattr(TopK, "select", Failing(TopK.select, 5, ValueError))
            with pytest.raises(ValueError, match="on purpose"):
                generate(one, *tokens)
        assert difference(generate(one, *tokens), expected) == 0


def test_a_cache_that_failed_is_usable_again_once_reset(monkeypatch):
    one = build()
    tokens = prompt(40)
    with small("snapkv").attach(one) as attachment:
        expected = generate(one, *tokens)
        cache = attachment.cache()
        with monkeypatch.context() as patch:
            patch.setattr(TopK, "select", Failing(TopK.select, 4, ValueError))
            with pytest.raises(ValueError, match="on purpose"):
                generate(one, *tokens, past_key_values=cache)
        cache.reset()
        assert difference(generate(one, *tokens, past_key_values=cache), expected) == 0
