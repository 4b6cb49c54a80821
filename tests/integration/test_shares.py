"""What is protected may be a share of the budget: held sets by a plain rule, shipped policies at any budget."""

import warnings

import pytest
import torch

import kvpolicy
from kvpolicy.errors import BudgetWarning, PolicyError
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.models.support import geometry_of
from kvpolicy.plan.plan import compile_policy
from kvpolicy.stages.registry.plugins import registry
from tests.support.models import PAD, VOCABULARY, build, generate, model, prompt
from tests.support.policies import held, small

LENGTHS = (90, 61, 40)


def decoded(one, cache, tokens, mask, steps):
    """The prompt, then one random token at a time; yields the tokens that each row has seen."""
    generator = torch.Generator().manual_seed(3)
    real = mask.sum(1).tolist()
    for _ in range(steps + 1):
        with torch.no_grad():
            one(tokens, attention_mask=mask, past_key_values=cache)
        yield real
        tokens = torch.randint(1, VOCABULARY, (tokens.shape[0], 1), generator=generator)
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        real = [count + 1 for count in real]


@pytest.mark.parametrize("recent", ["100%", "50%", 3])
@pytest.mark.parametrize("budget", [24, "20%", "30KiB"])
def test_sinks_and_a_share_of_recent_entries_by_hand(budget, recent):
    """With recency as the score, what is kept is the sinks and the newest, whatever the share that is protected."""
    policy = kvpolicy.load("streaming_llm", budget=budget, protect={"sinks": 4, "recent": recent})
    one, tokens = model(), prompt(*LENGTHS)
    with policy.attach(one) as attachment:
        cache = attachment.cache()
        for real in decoded(one, cache, *tokens, 12):
            for row, seen in enumerate(real):
                most = {24: 24, "20%": seen // 5}.get(budget, attachment.plan.budgets.average(seen))
                kept = min(seen, most)
                expected = [*range(4), *range(seen - kept + 4, seen)]
                assert [layer[row] for layer in held(cache)] == [[expected] * 2] * 3


@pytest.mark.parametrize("name", ["h2o", "d2o", "keepkv"])
def test_half_or_a_quarter_of_the_budget_is_recent(name):
    """The newest entries are all there, as many as the share of the row's own budget."""
    policy = kvpolicy.load(name, budget="40%")
    one, tokens = model(), prompt(*LENGTHS)
    parts, sinks = {"h2o": 2, "keepkv": 2, "d2o": 4}[name], 0 if name == "h2o" else 4
    with policy.attach(one) as attachment:
        cache = attachment.cache()
        for real in decoded(one, cache, *tokens, 6):
            for row, seen in enumerate(real):
                budget = seen * 2 // 5
                for layer in held(cache):
                    for head in layer[row]:
                        assert len(head) == budget
                        assert set(range(seen - budget // parts, seen)) <= set(head)
                        assert set(range(sinks)) <= set(head)


@pytest.mark.parametrize(
    ("name", "kernels"), [("h2o", False), ("snapkv", False), ("adakv", False), ("d2o", False), ("snapkv", True)]
)
def test_rows_under_shares_give_what_they_give_alone(name, kernels):
    """Rows of different lengths have different numbers of protected entries, in one batch and in one decode step."""
    one, (tokens, mask) = model(), prompt(45, 31)
    policy = small(name, budget="40%", every=3, protect={"sinks": "10%", "recent": "30%"})
    plan = compile_policy(policy.spec, geometry_of(one.config), "cpu", torch.float32, kernels=kernels)
    with Attachment(plan, one) as attachment:
        batch = attachment.cache()
        found = generate(one, tokens, mask, count=7, past_key_values=batch)
        for row, length in enumerate((45, 31)):
            alone = attachment.cache()
            expected = generate(one, tokens[row : row + 1, -length:], count=7, past_key_values=alone)
            assert torch.equal(found.sequences[row, -7:], expected.sequences[0, -7:])
            assert [layer[row] for layer in held(batch)] == [layer[0] for layer in held(alone)]
            if name in ("h2o", "snapkv"):
                assert {len(head) for layer in held(alone) for head in layer[0]} < set(range(12, 23))


@pytest.mark.parametrize("name", sorted(registry().policies()))
def test_every_shipped_policy_keeps_exactly_any_budget(name):
    """From 32 tokens up, a share, or bytes; after a prompt, or while decoding, and not a word of warning."""
    one, tokens = model(head_dim=32), prompt(100)[0]
    calibration = None
    shares = (
        () if kvpolicy.load(name).spec.protect.prompt else ("40%",)
    )  # a prompt is more than its own share, which is said
    # A budget of what is generated goes with a number of recent tokens, which comes on top of the prompt.
    fixed = {} if kvpolicy.load(name).spec.budget.generated is None else {"protect": {"prompt": True, "recent": 8}}
    for budget in (32, 33, 57, *shares, "1MiB"):
        policy = kvpolicy.load(name, budget=budget, **fixed)
        parts = [tokens]
        if not policy.spec.compress.prefill:  # a short prompt, a turn, and a token that is decoded
            policy, parts = (
                kvpolicy.load(name, budget=budget, compress={"prefill": False, "every": 3}, **fixed),
                tokens.split((20, 79, 1), 1),
            )
        if policy.spec.calibrated and calibration is None:
            calibration = policy.calibrate(one, prompt(64, 64)[0])
        with policy.attach(one, calibration=calibration) as attachment, torch.no_grad():
            cache = attachment.cache()
            for part in parts:
                one(part, past_key_values=cache)
            expected = {"40%": 40, "1MiB": min(100, attachment.plan.budgets.average(100))}.get(budget, budget)
            assert sum(layer.storage.slots.average for layer in cache.managed) == pytest.approx(3 * expected)
            one(tokens[:, :1], past_key_values=cache)


@pytest.mark.parametrize("name", ["full", "kivi4", "quest"])
def test_policies_that_keep_everything_still_do(name):
    one, tokens = model(head_dim=32), prompt(60, 41)
    expected = generate(one, *tokens)
    with kvpolicy.load(name).attach(one) as attachment:
        found = generate(one, *tokens)
        report = attachment.report()
        assert not attachment.plan.compresses_while_decoding
        assert attachment.plan.budgets.slack == 0
    assert [layer.compressions for layer in report.layers] == [0] * 3
    if name == "full":
        assert all(torch.equal(left, right) for left, right in zip(found.logits, expected.logits, strict=True))


def said(policy, *lengths):
    one = model()
    with warnings.catch_warnings(record=True) as caught, policy.attach(one) as attachment:
        warnings.simplefilter("always")
        for length in lengths:
            generate(one, *prompt(length), count=4)
        again = attachment.cache()
        with torch.no_grad():
            one(prompt(lengths[0])[0], past_key_values=again)
    return [str(warning.message) for warning in caught if warning.category is BudgetWarning]


def test_a_share_below_what_is_protected_is_said_once():
    """512 absolute recent entries of 10 % of some hundred tokens; once, whatever the layers, steps and caches."""
    policy = kvpolicy.load("h2o", budget="10%", protect={"recent": 30})
    (message,) = said(policy, 80, 70)
    assert message.startswith("policy h2o: 10% of 80 tokens is 8 entries, but 30 are held because they are protected; ")
    assert len(said(kvpolicy.load("h2o", budget="10%", protect={"recent": 512}), 80)) == 1
    assert len(said(kvpolicy.load("snapkv", budget="10%"), 80)) == 1


@pytest.mark.parametrize("name", ["h2o", "keepkv", "d2o", "streaming_llm", "rkv", "tova"])
def test_shipped_policies_hold_a_share_without_a_word(name):
    assert said(kvpolicy.load(name, budget="25%"), 80) == []


@pytest.mark.parametrize("protect", [{"sinks": 0, "recent": "50%"}, {"sinks": "5%", "recent": "20%"}])
def test_shares_serve_steps_of_fixed_shapes(protect):
    """With a budget in tokens they are numbers; the steps are those of a cache that grows."""
    one, tokens = build(), prompt(50, 37)
    policy = small("h2o", budget=21, every=2, protect=protect)
    with policy.attach(one):
        expected = generate(one, *tokens, count=12)
    with policy.attach(one, graph=True):
        found = generate(one, *tokens, count=12)
    assert torch.equal(found.sequences, expected.sequences)
    assert not bool((found.sequences == PAD).all())


def test_a_budget_that_cannot_hold_the_sinks_beside_a_share_is_refused():
    with pytest.raises(PolicyError, match="4 entries in all: 3"):
        kvpolicy.load("streaming_llm", budget=3)
    assert kvpolicy.load("streaming_llm", budget=4).spec.protect.of(4) == (4, 0)
