"""The interface of storages is neutral: with pages of a shared pool, layers, the step and attention run unchanged."""

import copy
import gc

import pytest
import torch
from hypothesis import settings

from kvpolicy.errors import CacheError
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.integrations.transformers.saving import cache_file
from kvpolicy.integrations.transformers.saving.model_digest import model_digest
from tests.property.test_layer_machine import LayerMachine
from tests.support.driving import new_layer
from tests.support.examples import examples
from tests.support.models import ARCHITECTURES, build, difference, generate, prompt
from tests.support.paged_storage import PAGE, PagePool
from tests.support.policies import held, small

POLICIES = {
    **{name: lambda name=name: small(name) for name in ("snapkv", "rkv", "h2o", "gkv", "streaming_llm", "tova")},
    "pyramidkv": lambda: small("pyramidkv", budget=20),
    "nothing is evicted": lambda: small("snapkv", budget=400),
    "merging": lambda: small("d2o"),
    "votes": lambda: small("snapkv", merge={"use": "keepkv", "window": 4}),
}
LENGTHS = (40, 29)


class PagedLayerMachine(LayerMachine):
    """Appends, evictions, rollbacks and moves of rows, in pages."""

    spare = PAGE

    def new_layer(self, plan):
        self.pool = PagePool(plan, 200)
        return new_layer(plan, self.pool.storage)

    def teardown(self):
        """Every page comes back once nobody holds the layer."""
        self.layer = None
        gc.collect()
        assert sorted(self.pool.free) == list(range(self.pool.pages))


TestPagedLayer = PagedLayerMachine.TestCase
TestPagedLayer.settings = settings(max_examples=examples(8), stateful_step_count=20)


def paged(attachment, pool=None):
    """A cache of the attachment whose entries are in pages."""
    plan = attachment.plan
    pool = pool or PagePool(plan, 100 * len(LENGTHS) * len(plan.geometry.managed))
    return PolicyCache(plan, attachment.model.config, new_storage=pool.storage), pool


@pytest.mark.parametrize("name", POLICIES)
def test_a_model_generates_what_it_generates_from_other_storage(name):
    model = build()
    tokens, mask = prompt(*LENGTHS)
    with POLICIES[name]().attach(model) as attachment:
        usual = attachment.cache()
        expected = generate(model, tokens, mask, 24, past_key_values=usual)
        cache, pool = paged(attachment)
        found = generate(model, tokens, mask, 24, past_key_values=cache)
        assert torch.equal(found.sequences, expected.sequences)
        assert difference(found, expected) < 1e-4
        assert held(cache) == held(usual)
        used = pool.pages - len(pool.free)
        assert used == sum(-(-length // PAGE) for layer in cache.managed for length, *_ in layer.storage.lengths)
        assert sum(layer.storage.nbytes for layer in cache.managed) == used * pool.page_bytes
        cache.check_integrity()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_so_does_every_architecture(architecture):
    model = build(architecture)
    tokens, mask = prompt(*LENGTHS)
    with small("snapkv").attach(model) as attachment:
        expected = generate(model, tokens, mask, 16, past_key_values=attachment.cache())
        cache, _ = paged(attachment)
        found = generate(model, tokens, mask, 16, past_key_values=cache)
        assert torch.equal(found.sequences, expected.sequences)


def test_forks_copies_and_beams_share_the_pool_and_no_page():
    model = build()
    tokens, mask = prompt(*LENGTHS)
    with small("h2o").attach(model) as attachment:
        usual, (cache, pool) = attachment.cache(), paged(attachment)
        for each in (usual, cache):
            generate(model, tokens, mask, 8, past_key_values=each)
        before = len(pool.free)
        forked, copied = cache.fork([1, 0, 1]), copy.deepcopy(cache)
        assert held(forked) == [[rows[row] for row in (1, 0, 1)] for rows in held(usual)]
        assert held(copied) == held(usual)
        for each in (cache, forked, copied):
            each.check_integrity()
        assert len(pool.free) < before
        del forked, copied, each
        gc.collect()
        assert len(pool.free) == before
        usual.reorder_cache(torch.tensor([1, 1]))
        cache.reorder_cache(torch.tensor([1, 1]))
        assert held(cache) == held(usual)


def test_a_saved_cache_goes_into_pages(tmp_path):
    model = build()
    tokens, mask = prompt(*LENGTHS)
    with small("snapkv").attach(model) as attachment:
        cache, pool = paged(attachment)
        generate(model, tokens, mask, 8, past_key_values=cache)
        before = len(pool.free)
        cache.save(tmp_path / "prefix.safetensors")
        other = cache_file.read(
            tmp_path / "prefix.safetensors",
            attachment.plan,
            model_digest(model),
            None,
            lambda regions: PolicyCache(attachment.plan, model.config, regions, new_storage=pool.storage),
        )
        other.check_integrity()
        assert held(other) == held(cache)
        assert len(pool.free) < before


def test_pages_are_refused_where_heads_hold_differently_many():
    with small("adakv").attach(build()) as attachment, pytest.raises(CacheError, match="equally many"):
        paged(attachment)[0].managed[0].new_state(1)
