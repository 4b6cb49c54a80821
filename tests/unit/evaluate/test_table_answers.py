"""Answers under a policy: caches filled from a trace are those of a real prompt, and mistakes are counted."""

from fractions import Fraction

import attrs
import pytest
import torch
from kvpolicy.evaluate.answers import answer, places_of
from kvpolicy.evaluate.fit import fit
from kvpolicy.evaluate.table.accuracy import answered
from kvpolicy.evaluate.table.trace import batch_of, catch, replay

import kvpolicy
from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.testbed import make_item
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer

WORDS = 5


@pytest.fixture(scope="module")
def items(tiny):
    """Recall items of different lengths, whose targets are what the model writes with its full cache."""
    model, tokenizer = tiny
    asked = [attrs.evolve(make_item("recall", 0, index, 128), new_tokens=WORDS) for index in range(3)]
    texts = answer(model, tokenizer, asked, None)[0].texts
    return [attrs.evolve(item, target=text) for item, text in zip(asked, texts, strict=True)]


def plan_of(tiny, name, length=128, share=Fraction(1, 4)):
    return fit(kvpolicy.load(name), tiny[0], length=length, share=share).compile(tiny[0])


def batch(tiny, items):
    found = batch_of(tiny[1], items)
    return found, catch(tiny[0], found.context, found.valid)


def test_batches_hold_question_target_and_end(tiny, items):
    """One by one, behind a context that is padded on the left."""
    _, tokenizer = tiny
    found = batch_of(tokenizer, items)
    ends = [f"{one.question} {one.target} <eos>" for one in items]

    assert tokenizer.batch_decode(found.later) == ends
    assert found.asked == 2
    assert found.targets == (WORDS,) * 3
    assert found.valid[:, -1].all()
    assert not found.valid.all()
    assert found.tokens == min(len(tokenizer(one.prompt).input_ids) for one in items) + 2 + WORDS


def test_questions_of_different_lengths_are_refused(tiny, items):
    """They could not be asked side by side."""
    longer = attrs.evolve(items[0], question="ask the falcon")

    with pytest.raises(EvaluationError, match="questions of one batch must be of one length"):
        batch_of(tiny[1], [longer, items[1]])


@pytest.mark.parametrize("name", ["snapkv", "h2o", "adakv", "keepkv", "full"])
def test_a_replayed_cache_is_that_of_the_real_prompt(tiny, items, name):
    """Entries, positions, votes and observed queries, in every row of a padded batch."""
    model, _ = tiny
    plan = plan_of(tiny, name)
    found, traced = batch(tiny, items)
    layers = [PolicyLayer(plan, ordinal) for ordinal in range(plan.geometry.layers)]
    replay(layers, traced, found.valid)
    policy = kvpolicy.policy.Policy(plan.spec)
    with torch.inference_mode(), policy.attach(model) as attachment:
        cache = attachment.cache()
        mask = found.valid.long()
        model(found.context, attention_mask=mask, position_ids=places_of(mask), past_key_values=cache)

    for ours, real in zip(layers, cache.managed, strict=True):
        assert ours.storage.slots.lengths == real.storage.slots.lengths
        for store in ("slots", "keys", "values"):
            one, other = (getattr(layer.storage, store) for layer in (ours, real))
            one, other = (getattr(store, "residual", store) for store in (one, other))
            for column, tensor in one.tensors.items():
                torch.testing.assert_close(tensor, other.tensors[column], rtol=1e-4, atol=1e-5)
        if ours.window.size:
            torch.testing.assert_close(ours.window.last([0]), real.window.last([0]), rtol=1e-4, atol=1e-5)


def test_the_full_cache_answers_as_it_does_alone(tiny, items):
    """Every word of what it wrote; the end is counted, and it does not write one."""
    found = answered(tiny[0], plan_of(tiny, "full"), *batch(tiny, items))

    assert found.before_mistake == (1.0,) * 3
    assert found.whole == (False,) * 3


def test_answers_count_up_to_the_first_mistake(tiny, items):
    """Each row by itself, whatever the others do; what is right after a mistake does not count."""
    wrong = []
    for place, item in enumerate(items):
        words = item.target.split()
        words[place + 1] = "falcon" if words[place + 1] != "falcon" else "maple"
        wrong.append(attrs.evolve(item, target=" ".join(words)))
    found = answered(tiny[0], plan_of(tiny, "full"), *batch(tiny, wrong))

    assert found.before_mistake == (1 / WORDS, 2 / WORDS, 3 / WORDS)
    assert found.whole == (False,) * 3


def test_a_whole_answer_ends(tiny, items, monkeypatch):
    """The end has to be written behind the last word."""
    model, _ = tiny
    found, traced = batch(tiny, items)
    end = found.later[0, -1].item()
    place = int(found.valid[0].sum()) + found.later.shape[1] - 2
    forward = model.forward

    def ending(*args, **call):
        out = forward(*args, **call)
        if "position_ids" in call:  # not where a model is only tried
            out.logits[call["position_ids"][:, -1] == place, -1, end] = 1e6
        return out

    monkeypatch.setattr(model, "forward", ending)
    whole = answered(model, plan_of(tiny, "full"), found, traced).whole

    assert whole[0]
    lengths = found.valid.sum(1).tolist()
    assert list(whole) == [length == lengths[0] for length in lengths]


def test_no_step_is_taken_once_all_rows_are_wrong(tiny, items):
    """The rest of a long answer costs nothing."""
    model, _ = tiny
    wrong = [attrs.evolve(item, target="beacon " + item.target) for item in items]
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    found, traced = batch(tiny, wrong)
    calls.clear()
    answered(model, plan_of(tiny, "snapkv"), found, traced)
    hook.remove()

    assert len(calls) == found.asked
