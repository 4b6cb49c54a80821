"""Policies that pack their entries or choose what to read, on whole models."""

from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy.errors import CalibrationError, PolicyError, UnsupportedCallError
from tests.support.alone import assert_rows_alone
from tests.support.models import ARCHITECTURES, build, difference, generate, model, prompt
from tests.support.policies import small
from tests.support.storage import segment

STORES = {
    "kivi": {"use": "kivi", "bits": 4, "group": 4, "residual": 8, "batch": 4},
    "tada": {"use": "tada", "bits": 4, "residual": 4, "batch": 4},
    "rotation": {"use": "rotation", "bits": 4, "batch": 1},
    "centred": {"use": "rotation", "bits": 3, "norm_correction": True, "centre": "calibrated", "batch": 2},
    "turboquant": {"use": "turboquant", "key_bits": 3, "batch": 3},
    "fp8": {"use": "fp8", "batch": 2},
    "latent": {"use": "latent", "rank": 0.5, "value_bits": 8, "value_group": 8, "batch": 2},
    "nova_vq": {"use": "nova_vq", "residual": 2, "batch": 3},
}
READERS = {
    "pages": {"use": "pages", "page": 4, "budget": 12, "dense_first": 0},
    "latent_topk": {"use": "latent_topk", "sinks": 2, "critical": 6, "recent": 4, "dense_first": 0, "dense_last": 0},
}
LENGTHS = (40, 29, 7)


def keeping_all(store="plain", read="all"):
    return kvpolicy.load("full", store=store, read=read)


def attached(one, policy):
    # Fewer than 64 tokens: without AVX-512, torch 2.13 refuses attention over more in bfloat16 on CPUs with AMX.
    calibration = policy.calibrate(one, prompt(48, 48)[0]) if policy.spec.calibrated else None
    return policy.attach(one, calibration=calibration)


def assert_independent(one, policy):
    with attached(one, policy) as attachment:
        return assert_rows_alone(one, attachment, *prompt(*LENGTHS), count=18)


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_rows_are_independent_when_everything_is_kept(store):
    assert_independent(model(), keeping_all(store))


@pytest.mark.parametrize(("architecture", "merge"), [("llama", {"use": "keepkv", "window": 4}), ("gemma3", "drop")])
@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_every_store_composes_with_eviction_and_merging(store, architecture, merge):
    assert_independent(model(architecture), small("snapkv", store=store, merge=merge))


def test_native_layers_stand_beside_packed_ones():
    one, ends = build(num_hidden_layers=4), {"native_first": 2, "native_last": 1}
    policy = small("snapkv", store={"use": "turboquant", **ends, "batch": 3}, merge={"use": "keepkv", "window": 4})
    assert_independent(one, policy)
    with policy.attach(one) as attachment:
        assert [bool(forms.keys.columns) for forms in attachment.plan.formats] == [False, True, True, False]


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in {"llama", "gemma3"}])
def test_latents_compose_with_eviction_in_every_architecture(architecture):
    """Of all stores, they alone know of the model: its rotation."""
    assert_independent(model(architecture), small("snapkv", store=STORES["latent"]))


@pytest.mark.parametrize(("store", "read"), [("plain", "pages"), ("kivi", "pages"), ("latent", "latent_topk")])
def test_readers_give_each_row_what_it_gets_alone(store, read):
    assert_independent(model(), keeping_all(STORES.get(store, store), READERS[read]))


@pytest.mark.parametrize("read", [{"use": "pages", "page": 4, "budget": 400}, "all"])
def test_a_reader_that_can_read_everything_changes_no_bit(read):
    one, tokens = model(), prompt(40)[0]
    expected = generate(one, tokens)
    with kvpolicy.load("full", read=read).attach(one):
        assert difference(generate(one, tokens), expected) == 0


@pytest.mark.parametrize("store", ["kivi", "tada"])
def test_until_something_is_packed_no_bit_changes(store):
    one, (tokens, mask) = model(), prompt(20)
    wide = {"kivi": {"use": "kivi", "group": 4, "residual": 64}, "tada": {"use": "tada", "residual": 64}}[store]
    expected = generate(one, tokens, mask)
    with keeping_all(wide).attach(one):
        assert difference(generate(one, tokens, mask), expected) == 0


def test_the_full_rank_of_latents_and_8_bits_are_nearly_exact():
    one, (tokens, mask) = build(dtype=torch.float64), prompt(40)
    expected = generate(one, tokens, mask)
    policy = keeping_all({"use": "latent", "rank": 1, "value_bits": 8, "value_group": 1, "scales": "full"})
    with attached(one, policy):
        assert difference(generate(one, tokens, mask), expected) < 1e-3


@pytest.mark.parametrize("name", ["full", "adakv"])
@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_a_step_is_that_of_the_plain_model_over_decoded_entries(store, name):
    """Of each head those that it holds: the others are masked out."""
    if name == "adakv" and store["use"] in ("tada", "latent"):
        name = "snapkv"  # their heads hold the same entries
    one, (tokens, _) = build(dtype=torch.float64), prompt(41)
    policy = keeping_all(store) if name == "full" else small(name, store=store)
    with attached(one, policy) as attachment, torch.no_grad():
        cache, decoded = attachment.cache(), DynamicCache(config=one.config)
        one(tokens[:, :40], past_key_values=cache)
        hidden = [in_place(layer.storage, decoded, number) for number, layer in enumerate(cache.managed)]
        lengths = {count for layer in cache.managed for count in layer.storage.lengths[0]}
        assert len(lengths) > 1 if name == "adakv" else len(lengths) == 1
        found = one(tokens[:, 40:], past_key_values=cache).logits
    with torch.no_grad(), masking(one, hidden):
        expected = one(tokens[:, 40:], past_key_values=decoded).logits
    assert (found - expected).abs().max() < 1e-9


def in_place(storage, decoded, number):
    """Puts entries as they are decoded where they were; gives which of the places [K, 41] nothing is in."""
    shape = 1, storage.heads, 40, 8
    keys, values, hidden = torch.zeros(shape).double(), torch.zeros(shape).double(), torch.ones(shape[1], 41).bool()
    hidden[:, 40] = False
    for head in range(storage.heads):
        at = segment(storage, "positions", 0, head).long()
        hidden[head, at] = False
        keys[0, head, at], values[0, head, at] = (segment(storage, one, 0, head) for one in ("keys", "values"))
    decoded.update(keys, values, number)
    return hidden


@contextmanager
def masking(one, hidden):
    """Each layer sees what is not hidden [K, 41] from its heads."""

    def mask(module, args, kwargs):
        group = one.config.num_attention_heads // one.config.num_key_value_heads
        away = hidden[module.layer_idx].repeat_interleave(group, 0)[None, :, None]
        return args, {**kwargs, "attention_mask": torch.zeros(away.shape).double().masked_fill(away, -torch.inf)}

    hooks = [layer.self_attn.register_forward_pre_hook(mask, with_kwargs=True) for layer in one.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}])
def test_ways_to_generate(store, options):
    one, (tokens, mask) = model(), prompt(40)
    with attached(one, small("snapkv", store=store)) as attachment:
        torch.manual_seed(0)
        assert generate(one, tokens, mask, count=12, **options).sequences.shape[1] == 52
        assert attachment.report().nbytes > 0


def test_the_report_says_what_was_read():
    one, (tokens, mask) = model(), prompt(60)
    with keeping_all(read=READERS["pages"]).attach(one) as attachment:
        generate(one, tokens, mask)
    layers = attachment.report().layers
    assert all(layer.held == 83 for layer in layers)
    assert all(8 < layer.read <= 12 + 4 for layer in layers)
    assert attachment.report().to_dict()["layers"][0]["read"] == layers[0].read
    assert "held, read: entries per KV head, now and in a step" in str(attachment.report())
    assert f"{layers[0].read:.1f}" in str(attachment.report())


def test_a_mask_that_is_not_causal_is_refused_before_a_packed_past():
    one = model()
    with keeping_all(STORES["kivi"]).attach(one) as attachment:
        cache = attachment.cache()
        hidden = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        hidden[..., 0] = False
        hidden[..., 0, 0] = True
        with torch.no_grad(), pytest.raises(UnsupportedCallError, match="hides more"):
            one(prompt(8)[0], attention_mask=hidden, past_key_values=cache)


def test_calibration_is_asked_for_and_checked(tmp_path):
    one, other, tokens = build(), build(seed=1), prompt(64, 64)[0]
    policy = keeping_all(STORES["latent"])
    with pytest.raises(PolicyError, match="store: latent needs a calibration for this model: kvpolicy calibrate full"):
        policy.attach(one)
    file = tmp_path / "latent.safetensors"
    policy.calibrate(one, tokens).save(file)
    policy.attach(one, calibration=file).detach()
    with pytest.raises(CalibrationError, match=r"latent\.safetensors: was made for another model"):
        policy.attach(other, calibration=file)
    with pytest.raises(CalibrationError, match="other plugins"):
        keeping_all({**STORES["latent"], "rank": 0.25}).attach(one, calibration=file)
    with pytest.raises(CalibrationError, match="needs no calibration"):
        keeping_all().calibrate(one, tokens)
    with pytest.raises(CalibrationError, match="tokens"):
        policy.calibrate(one, tokens[0])


def test_calibrating_leaves_the_model_as_it_was():
    one, (tokens, mask) = build(), prompt(40)
    before = generate(one, tokens, mask)
    policy = keeping_all(STORES["latent"])
    first = policy.calibrate(one, prompt(64, 64)[0])
    again = policy.calibrate(one, prompt(64, 64)[0])
    assert difference(generate(one, tokens, mask), before) == 0
    for left, right in zip(first.layers, again.layers, strict=True):
        assert torch.equal(left["store.basis"], right["store.basis"])


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ({"use": "kivi", "group": 16, "residual": 16}, "store: group: must divide the head dimension 8 of .*: 16"),
        (
            {"use": "latent", "value_group": 3, "batch": 2},
            "value_group: must divide the head dimension 8 of this model: 3",
        ),
    ],
)
def test_group_sizes_that_do_not_divide_are_refused_before_anything_changes(store, message):
    one = build()
    policy = keeping_all(store)
    name = one.config._attn_implementation
    with pytest.raises(PolicyError, match=message):
        attached(one, policy)
    assert one.config._attn_implementation == name
