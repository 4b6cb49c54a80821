"""Budgets that layers and heads compete for: one compression of the whole model, when a forward is over for all."""

import copy

import pytest
import torch

import kvpolicy
from kvpolicy.cache.storage.kv_tensor import KVTensor
from kvpolicy.errors import PolicyError, UnsupportedCallError
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.models.support import geometry_of
from kvpolicy.plan.explain import explain
from kvpolicy.plan.plan import compile_policy
from kvpolicy.spec.load import parse_policy
from tests.integration.test_eviction import DECODING, assert_as_if_masked
from tests.support.alone import assert_rows_alone, repeat
from tests.support.decisions import Decisions
from tests.support.models import build, difference, generate, model, prompt
from tests.support.policies import held, small

JOINT = {"joint": "global"}
LAYERS, HEADS = 3, 2


def competing(name="snapkv", budget=12, every=4, **rest):
    return small(name, budget, every, allocate=JOINT, **rest)


def entries(cache):
    """Held by each row in all layers and heads."""
    return torch.tensor([[[len(slots) for slots in heads] for heads in rows] for rows in held(cache)]).sum((0, 2))


def test_no_bit_changes_while_the_budget_holds_everything():
    tokens, mask = prompt(40, 29, 3)
    plain = generate(model(), tokens, mask)
    with kvpolicy.load("snapkv", allocate=JOINT).attach(model()):
        found = generate(model(), tokens, mask)
    assert torch.equal(found.sequences, plain.sequences)
    assert difference(found, plain) == 0


@pytest.mark.parametrize("name", ["snapkv", "rkv", "h2o", "gkv", "streaming_llm"])
def test_logits_are_those_of_the_plain_model_that_sees_what_is_held(name):
    assert_as_if_masked(competing(name), model(), DECODING)


@pytest.mark.parametrize("sizes", [(10, 15, 15, 1, 1, 7, 1, 14), (1,) * 64], ids=["chunks", "single"])
def test_logits_follow_what_is_held_however_the_tokens_come(sizes):
    assert_as_if_masked(competing(), model(), sizes)


def test_the_sum_over_layers_and_heads_is_the_budget_to_the_entry():
    """After a prompt exactly; then at most `every` - 1 tokens in each layer and head on top. Layers differ."""
    one, (tokens, mask) = model(), prompt(40, 29, 9)
    with competing().attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        attachment.model(tokens, attention_mask=mask, past_key_values=cache)
        assert entries(cache).tolist() == [LAYERS * HEADS * budget for budget in (12, 12, 9)]
        counts = torch.tensor([[[len(slots) for slots in heads] for heads in rows] for rows in held(cache)])
        assert len(counts[:, 0].flatten().unique()) > 2
        assert len(counts[:, 0].sum(-1).unique()) > 1
        for _ in range(12):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            attachment.model(tokens[:, -1:], attention_mask=mask, past_key_values=cache)
            assert (entries(cache) <= LAYERS * HEADS * (12 + 3)).all()
            cache.check_integrity()


def test_a_row_of_a_padded_batch_equals_its_own_run():
    with competing().attach(model()) as attachment:
        decisions = assert_rows_alone(model(), attachment, *prompt(40, 29, 7))
    assert decisions.repeated >= 5 + 5 + 4


@pytest.mark.parametrize(
    "rest", [{"store": {"use": "rotation", "batch": 2}}, {"merge": "window_fit"}, {"merge": "keepkv"}], ids=str
)
def test_merging_and_packing_come_after_the_layers_have_competed(rest):
    """A prompt is packed once, of what is left: no entry is packed, unpacked and packed again on the way."""
    policy = competing(**rest)
    with policy.attach(model()) as attachment:
        decisions = assert_rows_alone(model(), attachment, *prompt(40, 29, 7))
    assert decisions.repeated


def test_packing_waits_for_the_compression(monkeypatch):
    packed, inner = [], KVTensor._packed

    def noted(half, vectors, *others):
        packed.append(vectors.shape[2])
        return inner(half, vectors, *others)

    monkeypatch.setattr(KVTensor, "_packed", noted)
    with competing(store={"use": "rotation", "batch": 2}).attach(model()) as attachment, torch.no_grad():
        attachment.model(prompt(40)[0], past_key_values=attachment.cache())
    assert max(packed) < 40 - 4


def test_kernels_choose_what_the_references_choose():
    one, (tokens, mask) = build(), prompt(28, 17)
    runs = []
    decisions = Decisions()
    for kernels, mode in ((False, decisions.watched), (True, decisions.followed)):
        plan = compile_policy(competing().spec, geometry_of(one.config), "cpu", torch.float32, kernels=kernels)
        with Attachment(plan, one) as attachment, mode():
            cache = attachment.cache()
            options = {"count": 9, "past_key_values": cache}
            if runs:
                repeat(runs[0][0], slice(None), one, tokens, mask, **options)
            runs.append((generate(one, tokens, mask, **options) if not runs else None, held(cache)))
    assert runs[0][1] == runs[1][1]
    assert decisions.repeated >= 4


def test_beams_and_copies_carry_their_own_shares():
    one, (tokens, mask) = model(), prompt(40, 29)
    with competing().attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        attachment.model(tokens, attention_mask=mask, past_key_values=cache)
        other = copy.deepcopy(cache)
        other.reorder_cache(torch.tensor([1, 0]))
        assert [[rows[1], rows[0]] for rows in held(cache)] == held(other)
        longer = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        newest = tokens[:, -1:]
        first = attachment.model(newest, attention_mask=longer, past_key_values=cache).logits
        second = attachment.model(newest.flip(0), attention_mask=longer.flip(0), past_key_values=other).logits
        torch.testing.assert_close(second.flip(0), first, rtol=0, atol=1e-5)
        generate(one, tokens, mask, num_beams=3)


def test_assisted_decoding_is_refused():
    one = model()
    with (
        competing().attach(one),
        pytest.raises(UnsupportedCallError, match=r"allocate.joint: global compresses all layers at once"),
    ):
        generate(one, prompt(40)[0], assistant_model=build(seed=1))


def test_a_cache_that_refused_to_record_goes_on():
    """It was asked before anything had changed."""
    one, (tokens, _) = model(), prompt(40)
    with competing().attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        for refusing in (cache, cache.managed[0]):
            with pytest.raises(UnsupportedCallError, match="decode without an assistant"):
                refusing.activate_past_recording()
            attachment.model(tokens[:, :20], past_key_values=cache)
        assert entries(cache).tolist() == [LAYERS * HEADS * 12]


def test_fixed_shapes_are_refused():
    with pytest.raises(PolicyError, match=r"allocate.joint: graph: layers must not compete: global"):
        competing().attach(model(), graph=True)


def test_a_policy_says_one_thing_or_the_other():
    with pytest.raises(PolicyError, match="joint divides over layers and heads: leave layers and heads out"):
        small("snapkv", allocate={**JOINT, "heads": "adaptive"})


def test_it_is_written_and_read_and_has_a_digest_of_its_own():
    policy = competing()
    again = parse_policy(policy.to_yaml())
    assert "joint: global" in policy.to_yaml()
    assert again == policy.spec
    assert policy.digest != small("snapkv").digest


def test_the_plan_says_that_layers_compete():
    plan = compile_policy(competing().spec, geometry_of(model().config), "cpu", torch.float32)
    assert "layers compete: averages" in str(explain(plan, 100))
