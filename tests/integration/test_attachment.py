"""Attaching changes a model in a few places, and detaching gives it back as it was."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kvpolicy
from kvpolicy.errors import AttachError, KVPolicyError, PolicyError
from tests.support import fingerprint
from tests.support.models import ARCHITECTURES, VOCABULARY, build, difference, generate, model, prompt
from tests.support.policies import small


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_detached_model_is_as_it_was(architecture):
    one = build(architecture)
    before, library = fingerprint.of_model(one), fingerprint.of_library()
    tokens, mask = prompt(40, 29)
    attachment = small("adakv").attach(one)
    assert fingerprint.of_model(one) != before
    assert fingerprint.of_library() == library
    generate(one, tokens, mask)
    generate(one, tokens, mask, num_beams=2)
    attachment.detach()
    assert fingerprint.of_model(one) == before
    assert fingerprint.of_library() == library


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_that_was_set_comes_back(implementation):
    one = build()
    one.set_attn_implementation(implementation)
    with small("snapkv").attach(one):
        pass
    assert one.config._attn_implementation == implementation


def test_leaving_the_block_by_an_error_detaches():
    one = build()
    before = fingerprint.of_model(one)
    with pytest.raises(IndexError), small("snapkv").attach(one), torch.no_grad():
        one(torch.tensor([[VOCABULARY]]))
    assert fingerprint.of_model(one) == before


def test_attaching_twice_is_refused_and_leaves_the_first_in_place():
    one = build()
    with small("snapkv").attach(one):
        attached = fingerprint.of_model(one)
        with pytest.raises(AttachError, match="already"):
            small("rkv").attach(one)
        assert fingerprint.of_model(one) == attached
    with small("rkv").attach(one) as attachment:
        assert attachment.plan.spec.name == "rkv"


def test_detaching_twice_is_refused():
    one = build()
    attachment = small("snapkv").attach(one)
    attachment.detach()
    with pytest.raises(AttachError, match="detached"):
        attachment.detach()
    with pytest.raises(AttachError, match="detached"):
        attachment.cache()


def test_an_attachment_that_is_detached_early_does_not_disturb_the_next_one():
    one = build()
    with small("snapkv").attach(one) as first:
        first.detach()
        second = small("rkv").attach(one)
    assert second.cache().plan is second.plan
    second.detach()


def test_models_that_share_a_configuration_are_told_apart():
    one = build()
    other = type(one)(one.config).eval()
    tokens = prompt(40)[0]
    plain = generate(other, tokens)
    with small("snapkv").attach(one):
        with pytest.raises(AttachError, match="shares its configuration"):
            small("snapkv").attach(other)
        assert difference(generate(other, tokens), plain) == 0
    with small("snapkv").attach(other):
        pass


def test_two_models_are_attached_at_once():
    tokens = prompt(40)[0]
    models = [build(seed=0), build("qwen3", seed=1)]
    policies = [small("snapkv"), small("adakv")]
    alone = []
    for one, policy in zip(models, policies, strict=True):
        with policy.attach(one):
            alone.append(generate(one, tokens))
    attachments = [policy.attach(one) for one, policy in zip(models, policies, strict=True)]
    for one, expected in zip(models, alone, strict=True):
        assert difference(generate(one, tokens), expected) == 0
    attachments[0].detach()  # in the order of attaching, not nested
    assert difference(generate(models[1], tokens), alone[1]) == 0
    attachments[1].detach()


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda one: pickle.loads(pickle.dumps(one))}  # noqa: S301


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_copy_of_an_attached_model_is_attached_on_its_own(how):
    one = build()
    tokens = prompt(40)[0]
    plain = generate(one, tokens)
    with small("adakv").attach(one) as attachment:
        expected = generate(one, tokens)
        other = how(one)
        assert difference(generate(other, tokens), expected) == 0
        own = kvpolicy.integrations.transformers.attachment.attached(other)
        assert own is not attachment
        assert own.model is other
        assert own.report().layers[0].held <= 15
    assert difference(generate(other, tokens), expected) == 0
    own.detach()
    assert difference(generate(other, tokens), plain) == 0
    assert difference(generate(one, tokens), plain) == 0


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_copy_still_says_when_a_forward_goes_uncompressed(how):
    one = build()
    with small("snapkv").attach(one):
        other = how(one)
    with torch.no_grad(), pytest.warns(kvpolicy.errors.UncompressedWarning):
        other(prompt(4)[0], use_cache=True)


def test_a_saved_model_knows_nothing_of_the_policy(tmp_path):
    one = build()
    with small("snapkv").attach(one):
        one.save_pretrained(tmp_path)
    assert "kvpolicy" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert AutoConfig.from_pretrained(tmp_path)._attn_implementation != "kvpolicy"
    tokens = prompt(40)[0]
    other = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert difference(generate(other, tokens), generate(one, tokens)) == 0


def test_an_attached_model_is_freed_when_nothing_else_holds_it():
    one = build()
    attachment = small("snapkv").attach(one)
    generate(one, prompt(40)[0], count=2)
    gone = weakref.ref(one)
    del one, attachment
    gc.collect()
    assert gone() is None


def test_attaching_often_leaves_nothing_behind():
    one = build()
    before, library = fingerprint.of_model(one), fingerprint.of_library()
    for _ in range(50):
        with small("snapkv").attach(one):
            generate(one, prompt(20)[0], count=1)
    assert fingerprint.of_model(one) == before
    assert fingerprint.of_library() == library
    assert len(kvpolicy.integrations.transformers.attention_function.managed_modules) == 0


def test_a_budget_that_the_model_cannot_have_is_refused_before_anything_has_changed():
    one = build()
    before = fingerprint.of_model(one)
    with pytest.raises(PolicyError, match="at least"):
        small("snapkv", budget="1KiB").attach(one)
    assert issubclass(PolicyError, KVPolicyError)
    assert fingerprint.of_model(one) == before


def test_a_policy_compiles_for_a_configuration_as_for_its_model():
    one = model()
    plans = [small("gkv").compile(source) for source in (one, one.config)]
    assert plans[0].geometry == plans[1].geometry
    assert plans[0].columns == plans[1].columns
    assert plans[0].dtype == plans[1].dtype
