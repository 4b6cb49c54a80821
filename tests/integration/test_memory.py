"""Memory, counted in bytes of the storages that are really held."""

import pytest
import torch

import kvpolicy
from tests.support.models import VOCABULARY, model, prompt
from tests.support.policies import EVEN, RAGGED, small
from tests.support.storage import bytes_per_slot, tensors

EVERY = 4


def stepping(one, cache, tokens, mask, steps):
    """Feed the prompt, then one random token at a time; yields after each forward."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps + 1):
        with torch.no_grad():
            one(tokens, attention_mask=mask, past_key_values=cache)
        yield
        tokens = torch.randint(1, VOCABULARY, (tokens.shape[0], 1), generator=generator)
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)


def storage(layer):
    return {name: tensor.untyped_storage() for name, tensor in tensors(layer.storage).items()}


def bytes_of(layer):
    return sum(one.nbytes() for one in storage(layer).values())


def held_bytes(layer, per_slot):
    return sum(length + EVERY for row in layer.storage.slots.lengths for length in row) * per_slot


@pytest.mark.parametrize("lengths", [(40,), (40, 29)], ids=["alone", "padded"])
@pytest.mark.parametrize("name", [name for name in EVEN if name != "pyramidkv"])
def test_bytes_are_budget_plus_every_per_head_at_every_step(name, lengths):
    one = model()
    with small(name, budget=12, every=EVERY).attach(one) as attachment:
        cache = attachment.cache()
        heads = len(lengths) * cache.plan.geometry.kv_heads
        for _ in stepping(one, cache, *prompt(*lengths), 24):
            for layer in cache.managed:
                assert bytes_of(layer) == (12 + EVERY) * heads * bytes_per_slot(cache.plan)
                assert all(12 <= length < 12 + EVERY for row in layer.storage.slots.lengths for length in row)


def test_bytes_follow_the_budget_of_each_layer():
    one = model()
    with small("pyramidkv", budget=16, every=EVERY, protect={"recent": 2}).attach(one) as attachment:
        cache = attachment.cache()
        for step, _ in enumerate(stepping(one, cache, *prompt(40), 24)):
            budgets = cache.plan.budgets.per_layer(40 + step)
            assert len(set(budgets)) == 3
            assert sum(budgets) == 3 * 16
            for layer, budget in zip(cache.managed, budgets, strict=True):
                assert bytes_of(layer) <= (budget + EVERY) * 2 * bytes_per_slot(cache.plan)


@pytest.mark.parametrize("lengths", [(40,), (40, 29)], ids=["alone", "padded"])
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_heads_take_what_they_hold_plus_every(name, lengths):
    one = model()
    with small(name, budget=12, every=EVERY).attach(one) as attachment:
        cache = attachment.cache()
        per_slot, uneven = bytes_per_slot(cache.plan), False
        for step, _ in enumerate(stepping(one, cache, *prompt(*lengths), 24)):
            for layer in cache.managed:
                if step % EVERY == 0:
                    assert bytes_of(layer) == held_bytes(layer, per_slot)
                assert bytes_of(layer) == len(lengths) * 2 * (12 + EVERY) * per_slot
                uneven |= len(set(layer.storage.slots.lengths[0])) > 1
        assert uneven


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_storage_stays_in_place_from_one_compression_to_the_next(name):
    one = model()
    with small(name, budget=12, every=EVERY).attach(one) as attachment:
        cache, before = attachment.cache(), None
        for step, _ in enumerate(stepping(one, cache, *prompt(40, 40), 24)):
            pointers = [{name: one.data_ptr() for name, one in storage(layer).items()} for layer in cache.managed]
            assert before in (None, pointers) or (name == "adakv" and step % EVERY == 0)
            before = pointers


@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "adakv"])
def test_memory_does_not_grow_with_the_tokens(name):
    one = model()
    with small(name, budget=16, every=EVERY).attach(one) as attachment:
        cache = attachment.cache()
        sizes = {sum(map(bytes_of, cache.managed)) for _ in stepping(one, cache, *prompt(40), 300)}
        assert len(sizes) == 1
        assert attachment.report().parts["entries"] == sizes.pop()
        assert cache.get_seq_length() == 340
        assert all(layer.window.nbytes <= 4 * 32 * 8 * 4 + 32 * 8 for layer in cache.managed)


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_a_share_holds_that_part_of_the_tokens_seen(name):
    one = model()
    with small(name, budget="25%", every=EVERY).attach(one) as attachment:
        cache = attachment.cache()
        for step, _ in enumerate(stepping(one, cache, *prompt(80), 80)):
            for layer in cache.managed:
                seen = 80 + step
                held = sum(map(sum, layer.storage.slots.lengths)) / 2
                assert seen // 4 <= held < seen // 4 + EVERY
                assert bytes_of(layer) <= (seen // 4 + EVERY) * 2 * bytes_per_slot(cache.plan)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "adakv", "pyramidkv"])
def test_a_size_is_never_exceeded_once_the_prompt_is_in(name):
    one = model()
    with small(name, budget="24KiB", every=EVERY).attach(one) as attachment:
        cache = attachment.cache()
        for _ in stepping(one, cache, *prompt(160), 40):
            total = sum(bytes_of(layer) + layer.window.nbytes for layer in cache.managed)
            assert 0.8 * 24 * 1024 <= total <= 24 * 1024


def test_storage_grows_geometrically_up_to_the_budget():
    one = model()
    with small("h2o", budget=256, every=1).attach(one) as attachment:
        cache, sizes = attachment.cache(), set()
        for _ in stepping(one, cache, *prompt(3), 300):
            sizes.add(bytes_of(cache.managed[0]))
        assert len(sizes) <= 16
        assert max(sizes) == 257 * 2 * bytes_per_slot(cache.plan)


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_a_policy_for_prompts_only_moves_its_storage_rarely_while_decoding(name):
    one = model()
    with kvpolicy.load(name, budget=40, protect={"recent": 4}, compress={"every": "never"}).attach(one) as attachment:
        cache, pointers = attachment.cache(), set()
        for _ in stepping(one, cache, *prompt(60), 60):
            pointers.add(cache.managed[0].storage.keys.residual.tensors["keys"].shape[0])
        assert cache.managed[0].storage.slots.longest >= 100
        assert len(pointers) <= 6


def test_a_prompt_is_compressed_layer_by_layer():
    one, peaks = model(), []
    with small("snapkv").attach(one) as attachment:
        cache = attachment.cache()
        hooks = [
            layer.register_forward_hook(lambda *_: peaks.append([bytes_of(layer) for layer in cache.managed]))
            for layer in one.model.layers
        ]
        with torch.no_grad():
            one(prompt(64)[0], past_key_values=cache)
        for hook in hooks:
            hook.remove()
    assert peaks == [peaks[2][:done] + [0] * (3 - done) for done in (1, 2, 3)]
