"""One row of a batch turns NaN or infinite somewhere in a model: the others do not notice, and it recovers."""

import warnings

import pytest
import torch

import kvpolicy
from kvpolicy.errors import NonFiniteScoreWarning
from tests.integration.test_stores import READERS, STORES, attached
from tests.support.models import build, generate, prompt
from tests.support.policies import NAMES, small
from tests.support.storage import segment

ONE = build(num_hidden_layers=2)
STEPS, LENGTH, ROW = 26, 30, 1
MERGES = ("d2o", "cam", "kvmerger", "pivot", "tome", "weighted", "weightedkv", {"use": "window_fit", "attended": 0})
KEEPKV = {"use": "keepkv", "threshold": -1, "window": 4}
POLICIES = {
    **{name: lambda name=name: small(name) for name in (*NAMES, "blend3", "d2o", "keepkv")},
    **{str(merge): lambda merge=merge: small("snapkv", merge=merge) for merge in MERGES},
    "adakv and keepkv": lambda: small("adakv", merge=KEEPKV),
    **{f"{name} packed": lambda name=name: small("snapkv", store=STORES[name], merge=KEEPKV) for name in STORES},
    "ragged and packed": lambda: small("adakv", store=STORES["kivi"]),
    "kivi2": lambda: kvpolicy.load("kivi2", store={"use": "kivi", "bits": 2, "group": 4, "residual": 8, "batch": 4}),
    "quest": lambda: kvpolicy.load("quest", read=READERS["pages"]),
    "sals": lambda: kvpolicy.load("full", store=STORES["latent"], read=READERS["latent_topk"]),
}
KEEP_ALL = ("kivi2", "quest", "sals")
FAULTS = [("q_proj", torch.nan, 6), ("k_proj", torch.nan, 3), ("k_proj", torch.inf, 25), ("v_proj", torch.inf, 9)]


def run(policy, fault=None):
    """Generated logits, and what the layers hold; `fault` spoils one channel of a row at one place of the prompt."""
    tokens, mask = prompt(*[LENGTH] * 3)
    hooks = []
    if fault is not None:
        name, wrong, place = fault

        def spoil(_module, _inputs, output):
            if output.shape[1] == LENGTH:
                output = output.clone()
                output[ROW, place, 3] = wrong
            return output

        hooks = [getattr(ONE.model.layers[0].self_attn, name).register_forward_hook(spoil)]
    try:
        with attached(ONE, policy) as attachment, warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteScoreWarning)
            cache = attachment.cache()
            found = generate(ONE, tokens, mask, count=STEPS, past_key_values=cache)
            cache.check_integrity()
            return found, cache
    finally:
        for hook in hooks:
            hook.remove()


def faulty(cache):
    """How many entries of the row are not finite, and how many there are."""
    found = [
        segment(layer.storage, name, ROW, head).isfinite().all(-1)
        for layer in cache.managed
        for name in ("keys", "values")
        for head in range(2)
    ]
    return sum(int((~one).sum()) for one in found), sum(one.numel() for one in found)


@pytest.mark.parametrize("name", POLICIES)
def test_the_other_rows_give_what_they_give(name):
    policy = POLICIES[name]()
    usual, _ = run(policy)
    for fault in FAULTS[list(POLICIES).index(name) % 2 :: 2]:
        found, cache = run(policy, fault)
        for one, plain in zip(found.logits, usual.logits, strict=True):
            # More is read of the faulty row, or more merged in it, or, where heads differ, its entries end elsewhere:
            # products of other shapes round, and of numbers that begin elsewhere.
            plain_store = (policy.spec.store.name, policy.spec.merge.name) == ("plain", "drop")
            if policy.spec.allocate.divider.ragged or not plain_store:
                torch.testing.assert_close(one[[0, 2]], plain[[0, 2]], rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(one[[0, 2]], plain[[0, 2]])
        wrong, held = faulty(cache)
        if name in KEEP_ALL or fault[0] == "v_proj":
            assert wrong < held
        else:  # a value is no reason to go, and where all is kept it stays
            assert wrong == 0
            assert found.logits[-1].isfinite().all()
