"""A cache that is filled from computed prompts is the one that the attached model fills itself."""

from fractions import Fraction
from functools import cache

import attrs
import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy.evaluate.fitting.fit import fit_calibrated
from kvpolicy.evaluate.harness.calibrations import Calibrations
from kvpolicy.evaluate.harness.traced_prompts import padded, trace_prompts
from kvpolicy.spec.budget import Budget
from kvpolicy.stages.registry.plugins import registry
from tests.support.models import build, prompt
from tests.support.policies import held, small
from tests.support.rereading import forwards, rereading
from tests.support.states import assert_same_state

SHIPPED = tuple(registry().policies())
LENGTHS = {"equal": (96, 96), "padded": (96, 61, 75)}
BUDGET = 40  # at most: below the prompts, whatever the store


@cache
def model(architecture):
    """Two query heads a KV head, wide enough for every store; with a sliding layer for gemma3."""
    return build(architecture, num_hidden_layers=3 if architecture == "gemma3" else 2, head_dim=32)


@cache
def prompts_of(lengths):
    """Prompts as lists of ids, and as tokens and mask."""
    tokens, mask = prompt(*lengths)
    return [row[real.bool()].tolist() for row, real in zip(tokens, mask, strict=True)], tokens, mask


@cache
def traced_of(architecture, lengths):
    return trace_prompts(model(architecture), prompts_of(lengths)[0])


@pytest.fixture(scope="module")
def plans():
    """Each shipped policy by name, smaller than the prompts that it compresses, calibrated if it must be."""
    llama, made = model("llama"), {}
    calibrations = Calibrations(llama, lambda: prompt(64, 64, 64, seed=7)[0])
    for name in SHIPPED:
        policy = kvpolicy.load(name)
        if not policy.spec.compress.prefill:  # what it keeps of a prompt is all of it, whatever the budget
            decoding = kvpolicy.load(name, budget=2 * BUDGET + 96)
            made[name] = decoding.compile(llama, calibration=calibrations.of(decoding))
            continue
        fitted = fit_calibrated(policy, llama, share=Fraction(1, 4), length=96, calibrate=calibrations.of)
        budget = fitted.spec.budget
        if budget.share is None:
            budget = Budget(tokens=min(budget.tokens, BUDGET))
        fitted = attrs.evolve(fitted, spec=attrs.evolve(fitted.spec, budget=budget))
        made[name] = fitted.compile(llama, calibration=calibrations.of(fitted))
    return made


def real_forward(attachment, plan, tokens, mask):
    """The cache of a plan after the attached model has read the prompts."""
    filled = attachment.adopt(kvpolicy.PolicyCache(plan, attachment.model.config))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        attachment.model(tokens, attention_mask=mask, position_ids=places, past_key_values=filled)
    return filled


def next_logits(one, filled, mask):
    """Of one more token in each row."""
    token = torch.arange(5, 5 + len(mask))[:, None]
    mask, places = torch.nn.functional.pad(mask, (0, 1), value=1), mask.sum(1, keepdim=True)
    with torch.inference_mode():
        return one(token, attention_mask=mask, position_ids=places, past_key_values=filled).logits


def assert_filled_as_by_the_model(architecture, plan, lengths):
    """Every layer, row and head holds the same, all other state is the same, and so are the bits of the next logits."""
    one, traced = model(architecture), traced_of(architecture, lengths)
    _, tokens, mask = prompts_of(lengths)
    with kvpolicy.load("full").attach(one) as attachment:
        filled = traced.compressed(plan, attachment)
        real = real_forward(attachment, plan, tokens, mask)
        assert held(filled) == held(real)
        assert_same_state(filled, real)
        filled.check_integrity()
        assert torch.equal(next_logits(one, filled, mask), next_logits(one, real, mask))
        assert held(filled) == held(real)
    return real


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_policy_is_as_after_a_real_forward(plans, name, lengths):
    real = assert_filled_as_by_the_model("llama", plans[name], lengths)

    longest = max(len(positions) for layer in held(real) for row in layer for positions in row)
    spec = plans[name].spec
    assert (longest < 96) == (spec.budget.share is None and spec.compress.prefill)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_layers_with_a_sliding_window_are_as_after_a_real_forward(name, lengths):
    plan = small(name).compile(model("gemma3"))
    real = assert_filled_as_by_the_model("gemma3", plan, lengths)

    assert [index for index, layer in enumerate(real.layers) if layer not in real.managed] == [0]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_cache_that_was_filled_leaves_the_prompts_as_they_were(architecture):
    """A second one, after the first has gone on, is the same again."""
    one, traced = model(architecture), traced_of(architecture, LENGTHS["padded"])
    mask = prompts_of(LENGTHS["padded"])[2]
    with kvpolicy.load("full").attach(one) as attachment:
        caches = [traced.compressed(small("snapkv").compile(one), attachment)]
        first = next_logits(one, caches[0], mask)
        caches.append(traced.compressed(small("snapkv").compile(one), attachment))
        assert torch.equal(next_logits(one, caches[1], mask), first)
        assert_same_state(*caches)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_a_policy_that_reads_prompts_again_computes_them_itself(lengths):
    """One forward over the prompt and one a pass, with what the attached policy gives by itself."""
    one, traced = model("llama"), traced_of("llama", lengths)
    _, tokens, mask = prompts_of(lengths)
    plan = rereading().compile(one)
    with rereading().attach(one) as attachment:
        seen, handle = forwards(one)
        filled = traced.compressed(plan, attachment)
        handle.remove()
        real = real_forward(attachment, plan, tokens, mask)
        widths = [(call.get("input_ids") if "input_ids" in call else tokens).shape[1] for call in seen]
        assert widths == [96, *[5] * 19, 1]
        assert held(filled) == held(real)
        assert torch.equal(next_logits(one, filled, mask), next_logits(one, real, mask))
        assert all(len(row[0]) < 96 for layer in held(filled) for row in layer)


def test_other_policies_need_no_further_forward():
    one, traced = model("llama"), traced_of("llama", LENGTHS["equal"])
    with kvpolicy.load("full").attach(one) as attachment:
        seen, handle = forwards(one)
        traced.compressed(small("snapkv").compile(one), attachment)
        handle.remove()
    assert seen == []


# -- the full cache --------------------------------------------------------------------------------------------


def plain_forward(architecture, tokens, mask):
    """The library's own cache after a forward of the model that no policy is attached to."""
    one = model(architecture)
    stock = DynamicCache(config=one.config)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        one(tokens, attention_mask=mask, position_ids=places, past_key_values=stock)
    return stock


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_full_cache_has_the_bits_of_the_plain_model(architecture, lengths):
    """Rows repeated and in another order; what a pad gives is compared, too. Then both go on alike."""
    one, traced = model(architecture), traced_of(architecture, lengths)
    _, tokens, mask = prompts_of(lengths)
    rows = [1, 0, 1]
    made, plain = traced.uncompressed(rows, one), plain_forward(architecture, tokens, mask)
    plain.batch_select_indices(torch.tensor(rows))

    assert type(made) is DynamicCache
    assert [type(layer) for layer in made.layers] == [type(layer) for layer in plain.layers]
    assert made.get_seq_length() == 96
    for ours, theirs in zip(made.layers, plain.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    assert torch.equal(next_logits(one, made, mask[rows]), next_logits(one, plain, mask[rows]))


def test_each_prompt_stands_at_the_right_edge():
    prompts, tokens, mask = prompts_of(LENGTHS["padded"])
    found, valid = padded(prompts, torch.device("cpu"))

    assert torch.equal(found, tokens)
    assert torch.equal(valid, mask.bool())
    assert traced_of("llama", LENGTHS["padded"]).lengths == [96, 61, 75]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_another_dtype_rounds_what_was_computed(architecture):
    """Queries, keys and values of managed layers, and keys and values of the others; the exact ones stay."""
    one, lengths = model(architecture), LENGTHS["padded"]
    exact = trace_prompts(one, prompts_of(lengths)[0])
    full = exact.uncompressed([0, 1, 2], one)
    expected = [(layer.keys.bfloat16(), layer.values.bfloat16()) for layer in full.layers]
    queries = [layer.queries.bfloat16() for layer in exact.layers]
    rounded = exact.to(torch.bfloat16)
    found = rounded.uncompressed([0, 1, 2], build(architecture, num_hidden_layers=one.config.num_hidden_layers))

    assert torch.equal(rounded.tokens, exact.tokens)
    again = exact.uncompressed([0, 1, 2], one)
    for layer, other in zip(again.layers, full.layers, strict=True):
        assert layer.keys.dtype == torch.float32
        assert torch.equal(layer.keys, other.keys)
    assert all(torch.equal(layer.queries, own) for layer, own in zip(rounded.layers, queries, strict=True))
    for layer, (keys, values) in zip(found.layers, expected, strict=True):
        assert layer.keys.dtype == layer.values.dtype == torch.bfloat16
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
