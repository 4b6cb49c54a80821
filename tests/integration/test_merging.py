"""Entries that stand for others, packed or not, on whole models of many shapes; shared, copied and stored policies."""

import copy
import io

import pytest
import torch

from kvpolicy.integrations.transformers.attachment import attached as attachment_of
from tests.integration.test_concurrency import together
from tests.integration.test_stores import READERS, STORES, attached
from tests.support.alone import assert_rows_alone
from tests.support.models import build, generate, model, prompt
from tests.support.policies import small

LENGTHS = (40, 29, 7)
MERGES = {
    "window_fit": "window_fit",
    "scale": {"use": "keepkv", "threshold": -1, "window": 4},
    "additive": {"use": "keepkv", "threshold": -1, "key": "additive", "window": 1},
    "lstsq": {"use": "keepkv", "threshold": -1, "key": "additive", "gqa": "lstsq"},
    "bias": {"use": "keepkv", "threshold": -1, "key": "bias"},
    "mean": {"use": "keepkv", "threshold": -1, "key": "mean", "estimate": "window", "window": 3},
}
SHAPES = {
    "one head": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
    "no groups": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64},
    "groups of two": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}


@pytest.mark.parametrize(
    ("name", "merge"),
    [*(("snapkv", name) for name in MERGES), *(("adakv", name) for name in list(MERGES)[::2])],  # heads alike, and not
)
def test_rows_are_independent_whatever_is_merged(name, merge):
    with small(name, merge=MERGES[merge]).attach(model()) as attachment:
        assert_rows_alone(model(), attachment, *prompt(*LENGTHS), count=18)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}])
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_ways_to_generate(merge, options):
    one, (tokens, mask) = model(), prompt(40)
    with small("snapkv", merge=merge).attach(one) as attachment:
        torch.manual_seed(0)
        assert generate(one, tokens, mask, count=12, **options).sequences.shape[1] == 52
        assert all(layer.compressions for layer in attachment.report().layers)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("store", [*STORES, "plain"])
def test_every_store_holds_models_of_every_shape_and_precision(store, dtype, shape):
    one, (tokens, mask) = build(dtype=dtype, **shape), prompt(40, 29)
    policy = small("snapkv", store=STORES.get(store, store), merge=MERGES["scale"])
    with attached(one, policy) as attachment:
        out = generate(one, tokens, mask, count=12)
        held = attachment.report().layers
    assert all(logits.isfinite().all() and logits.dtype in (dtype, torch.float32) for logits in out.logits)
    assert all(layer.held <= 12 + 4 for layer in held)
    plan = attachment.plan
    assert sum(layer.entry_bytes for layer in held) <= 2 * plan.footprint.nbytes(12 + 4) + 1


@pytest.mark.parametrize("store", ["kivi", "latent", "tada"])
def test_threads_on_their_own_models_share_a_policy_that_packs(store):
    policy = small("snapkv", store=STORES[store], merge=MERGES["scale"])
    models = [build(seed=seed) for seed in range(2)]
    for one in models:
        attached(one, policy)
    texts = [prompt(40, 29, seed=seed) for seed in range(2)]
    pairs = list(zip(models, texts, strict=True))
    alone = [generate(one, *text).sequences for one, text in pairs]
    jobs = [lambda one=one, text=text: generate(one, *text).sequences for one, text in pairs]
    assert all(torch.equal(left, right) for left, right in zip(together(jobs), alone, strict=True))


def _pickled(one):
    file = io.BytesIO()
    torch.save(one, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("read", ["all", "latent_topk"])
@pytest.mark.parametrize("store", ["kivi", "latent"])
@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_a_model_is_copied_with_what_is_attached_to_it(copied, store, read):
    one, tokens = build(), prompt(40, 29)
    read = READERS["pages"] if store == "kivi" and read != "all" else READERS.get(read, read)
    with attached(one, small("snapkv", store=STORES[store], read=read)):
        expected = generate(one, *tokens).sequences
        other = copied(one)
        assert torch.equal(generate(other, *tokens).sequences, expected)
        attachment_of(other).detach()
        assert torch.equal(generate(one, *tokens).sequences, expected)
