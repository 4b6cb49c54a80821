"""Attention error and bytes: against sums written out by hand, and against the plan's formula."""

from fractions import Fraction

import attrs
import pytest
import torch
from kvpolicy.evaluate.calibrations import Calibrations
from kvpolicy.evaluate.fit import fit, keeps_everything
from kvpolicy.evaluate.table.error import attention_error, exact_attention, filled, reference_of, tokens_of
from kvpolicy.evaluate.table.storage import storage_of
from kvpolicy.evaluate.table.trace import Traced, batch_of, catch

import kvpolicy
from kvpolicy.evaluate.testbed import load_testbed, make_item
from kvpolicy.stages.registry.plugins import registry

SHIPPED = tuple(registry().policies())


@pytest.fixture(scope="module")
def testbed():
    """Model, calibrations, and the reference of two recall items."""
    model, tokenizer = load_testbed(torch.bfloat16)
    return model, Calibrations(model, sequences=3, length=128), reference(model, tokenizer)


def reference(model, tokenizer, task="recall", steps=3, rows=2):
    batch = batch_of(tokenizer, [make_item(task, 0, index, 256) for index in range(rows)])
    tokens, valid = tokens_of(batch)
    return reference_of(batch, catch(model, tokens, valid), valid, steps)


@pytest.fixture(scope="module")
def tiny_reference(tiny):
    return reference(*tiny, task="tracking", steps=4, rows=3)


def test_exact_attention_is_the_sum_written_out():
    """Query by query, head by head; pads and later tokens are not seen."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, heads, 5, 4, generator=generator) for heads in (4, 2, 2))
    valid = torch.tensor([[False, True, True, True, True], [True] * 5])
    found = exact_attention(Traced(queries, keys, values, 0.3), valid, 2)

    assert found.dtype == torch.float64
    for row, first in ((0, 1), (1, 0)):
        for head in range(4):
            for step, end in ((0, 4), (1, 5)):
                logits = keys[row, head // 2, first:end].double() @ queries[row, head, end - 1].double() * 0.3
                expected = logits.softmax(0) @ values[row, head // 2, first:end].double()
                torch.testing.assert_close(found[row, head, step], expected)


def test_the_reference_is_what_the_model_computes(tiny, tiny_reference):
    """The newest tokens are question and answer; all before them are the prompt."""
    assert tiny_reference.steps == 4
    assert tiny_reference.valid.shape[1] == tiny_reference.traced[0].keys.shape[2] - 4
    assert not tiny_reference.valid.all()


def test_keeping_everything_has_no_error(tiny, tiny_reference):
    """Apart from float32."""
    found = attention_error(filled(kvpolicy.load("full").compile(tiny[0]), tiny_reference), tiny_reference)

    assert found.worst < 1e-5
    assert found.read == 1.0


def test_the_error_of_a_recent_window_is_that_of_the_rest_left_out(tiny, tiny_reference):
    """Sinks and the newest entries, as the policy says; the mean over rows, heads and steps."""
    model, _ = tiny
    plan = kvpolicy.load("streaming_llm", budget=20, protect={"sinks": 4, "recent": 16}).compile(model)
    found = attention_error(filled(plan, tiny_reference), tiny_reference)
    for layer, traced in enumerate(tiny_reference.traced):
        length = traced.keys.shape[2]
        errors = []
        for step in range(4):
            end = length - 3 + step
            valid = torch.nn.functional.pad(tiny_reference.valid, (0, 4), value=True)[:, :end]
            place = valid.long().cumsum(1) - 1
            newest = place[:, -1:] - place
            kept = valid & ((place < 4) | (newest < 16) | (newest == 16))  # 20 before the step, and its own token
            one = Traced(*(getattr(traced, name)[:, :, :end] for name in ("queries", "keys", "values")), traced.scaling)
            exact = tiny_reference.exact[layer][:, :, step : step + 1]
            errors.append((exact_attention(one, kept, 1) - exact).norm(dim=-1) / exact.norm(dim=-1))
        assert found.by_layer[layer] == pytest.approx(float(torch.cat(errors, 2).mean()), rel=1e-4)
    assert found.mean == pytest.approx(sum(found.by_layer) / len(found.by_layer))
    assert found.worst == max(found.by_layer)


def test_readers_say_how_much_they_read(tiny, tiny_reference):
    """Everything is held; a step attends to some of it."""
    model, _ = tiny
    length = int(tiny_reference.valid.sum(1).min())
    policy = kvpolicy.load("quest", read={"use": "pages", "page": 4, "budget": 32, "dense_first": 0})
    layers = filled(policy.compile(model), tiny_reference)
    found = attention_error(layers, tiny_reference)

    assert 24 / (length + 10) < found.read <= 32 / length
    assert found.worst > 0.01
    assert all(layer.stats.held >= length for layer in layers)


@pytest.mark.parametrize("name", SHIPPED)
def test_bytes_are_those_of_the_formula(testbed, name):
    """After a prompt, for every shipped policy; for those that evict also when tokens have been decoded."""
    model, calibrations, found = testbed
    fitted = fit(kvpolicy.load(name), model, length=250, share=Fraction(1, 4), calibrations=calibrations)
    layers = filled(calibrations.plan(fitted), found)
    after = [storage_of(layers)]
    if not keeps_everything(fitted.spec):
        attention_error(layers, found)
        after.append(storage_of(layers))

    for storage in after:
        assert storage.measured == storage.formula
        assert storage.per_entry == storage.formula_per_entry == storage.measured / storage.slots / 8
        assert storage.full_per_entry == 2 * 32 * 2
    if not keeps_everything(fitted.spec):
        assert storage.measured <= 250 * storage.full_per_entry * 8 / 4


def test_a_wrong_formula_would_show(testbed):
    """One byte too few per entry."""
    _, calibrations, found = testbed
    layers = filled(calibrations.plan(kvpolicy.load("full")), found)
    plan = layers[0].plan
    footprint = attrs.evolve(plan.footprint, columns={})
    wrong = attrs.evolve(plan, budgets=attrs.evolve(plan.budgets, footprint=footprint))
    for layer in layers:
        layer.plan = wrong

    assert storage_of(layers).measured > storage_of(layers).formula
