"""The state of a cache is complete: whatever can be reached in a cache is there in its copies, and is their own."""

import copy

import pytest
import torch

import kvpolicy
from kvpolicy.errors import KVPolicyError, NonFiniteScoreWarning
from tests.support.models import build, model, prompt
from tests.support.states import KIVI, assert_same_state, everything, reachable


def grown(one, attachment, *, moves=True):
    """A cache after a varied life: pads, evictions, merges, packing, a second turn, undone tokens, moved rows."""
    tokens, mask = prompt(40, 29)
    more, more_mask = prompt(9, 5, seed=1)
    cache = attachment.cache()
    with torch.no_grad():
        one(tokens, attention_mask=mask, past_key_values=cache)
        for step in range(7):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            one(tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache)
        mask = torch.cat([mask, more_mask], 1)
        one(more, attention_mask=mask, past_key_values=cache)
        if moves:
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.activate_past_recording()
            one(more[:, :3], past_key_values=cache)
            cache.crop(-1)
    return cache


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_forks_loaded_caches_and_copies_have_all_that_can_be_reached(architecture, tmp_path):
    one = model(architecture)
    with everything().attach(one) as attachment:
        cache = grown(one, attachment)
        cache.save(tmp_path / "c")
        for other in (cache.fork(), attachment.load_cache(tmp_path / "c"), copy.deepcopy(cache)):
            other.check_integrity()
            assert_same_state(cache, other)


def test_the_life_was_varied():
    """What is compared above is there: else the comparison would say nothing."""
    one = model("gemma3")
    with everything().attach(one) as attachment:
        cache = grown(one, attachment)
        layer, found = cache.managed[0], dict(reachable(cache))
        assert layer.compressed
        assert layer.record_past
        assert not layer.expects_prompt
        assert layer.state.compressions > 1
        assert layer.rollback_limit
        assert len({length for row in layer.storage.slots.lengths for length in row}) > 1
        assert layer.storage.keys.packed.longest
        assert layer.storage.page_summaries.store.longest
        assert layer.row_state
        assert layer.window._filled
        assert len(layer.storage.slots.columns) > 2
        paths = " ".join(found)
        for part in (
            "layers[0].cumulative_length",
            "state.row_state['",
            "storage.page_summaries.store.tensors['",
            "keys._stuck",
        ):
            assert part in paths


PARTS = {
    "a layer": lambda cache: cache.managed[0],
    "the entries": lambda cache: cache.managed[0].storage,
    "keys": lambda cache: cache.managed[0].storage.keys,
    "a store": lambda cache: cache.managed[0].storage.slots,
    "pages": lambda cache: cache.managed[0].storage.page_summaries,
    "a window": lambda cache: cache.managed[0].window,
    "a stock layer": lambda cache: cache.layers[0],
}


@pytest.mark.parametrize("value", [torch.ones(2), 7], ids=["tensor", "number"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_state_that_is_added_later_cannot_be_forgotten(part, value, tmp_path):
    """The comparison finds an attribute that somebody adds to any part of a layer, and that a file does not have."""
    one = model("gemma3")
    with everything().attach(one) as attachment:
        cache = grown(one, attachment)
        part(cache).added_later = value
        with pytest.raises((AssertionError, KVPolicyError)):
            save_and_compare(cache, attachment, tmp_path / "c")


def save_and_compare(cache, attachment, path):
    cache.save(path)
    assert_same_state(cache, attachment.load_cache(path))


def test_segments_that_cannot_be_packed_are_remembered(tmp_path):
    """Entries that are NaN stay as they are, and with them what comes behind, until they are evicted."""
    one = build()
    embedded = one.get_input_embeddings()(prompt(21, 21)[0]).detach()
    embedded[1, 9] = torch.nan
    with kvpolicy.load("full", store=KIVI).attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        with pytest.warns(NonFiniteScoreWarning):
            one(inputs_embeds=embedded, past_key_values=cache)
        cache.save(tmp_path / "c")
        stuck = [layer.storage.keys._stuck for layer in cache.managed]
        assert any(stuck)
        for other in (cache.fork(), attachment.load_cache(tmp_path / "c"), copy.deepcopy(cache)):
            assert_same_state(cache, other)
        moved = cache.fork([1, 1, 0])
        expected = [{(new, head) for row, head in each if row for new in (0, 1)} for each in stuck]
        assert [layer.storage.keys._stuck for layer in moved.managed] == expected


def test_windows_that_are_full_keep_their_order(tmp_path):
    """Their buffer goes round: the oldest query is anywhere in it."""
    one = build()
    with everything().attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        one(prompt(9)[0], past_key_values=cache)
        one(prompt(1)[0], past_key_values=cache)
        cache.save(tmp_path / "c")
        assert cache.managed[0].window._oldest
        assert_same_state(cache, attachment.load_cache(tmp_path / "c"))


def test_bytes_are_counted_in_copies(tmp_path):
    """Those of every storage: of the forked and loaded ones as of the first."""
    one = model("gemma3")
    with everything().attach(one) as attachment:
        cache = grown(one, attachment)
        cache.save(tmp_path / "c")
        for other in (cache.fork(), attachment.load_cache(tmp_path / "c")):
            report = attachment.report()
            assert [(each.seq_len, each.compressions) for each in report.layers] == [
                (58, cache.stats[0].compressions)
            ] * 2
            held = [layer.storage.slots.average for layer in other.managed]
            assert [each.held for each in report.layers] == held
            for layer, each in zip(other.managed, report.layers, strict=True):
                found = [tensor for _, tensor in reachable([layer.storage, layer.row_state])]
                found += [*layer.storage.index_tensors, layer.window._queries, layer.window._positions]
                assert each.nbytes == sum(one.untyped_storage().nbytes() for one in found if torch.is_tensor(one))
            stock = sum(tensor.nbytes for _, tensor in reachable(other.layers[0]) if isinstance(tensor, torch.Tensor))
            assert report.stock_bytes == stock
