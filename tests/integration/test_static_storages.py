"""Storage of fixed shapes: how large it is, which caches and models share one, and when another takes its place."""

import gc

import attrs
import pytest
import torch

from kvpolicy.integrations.transformers.decode_graph.session import StaticSession
from kvpolicy.stages import LayerAllocator
from tests.integration.static_steps import DEVICES, assert_alike, fed
from tests.support.alone import repeat
from tests.support.decisions import Decisions
from tests.support.models import build, generate, model, prompt
from tests.support.policies import small


@pytest.mark.parametrize("device", DEVICES)
def test_storages_and_shapes_stay_the_same_for_generations_and_rounds(device, steps, monkeypatch):
    one, seen, run = build().to(device), [], StaticSession.run

    def recorded(session, tokens, places):
        tensors = [tensor for layer in session.layers for tensor in layer.in_step + layer.window.in_step]
        seen.append([(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors])
        return run(session, tokens, places)

    monkeypatch.setattr(StaticSession, "run", recorded)
    with small("gkv").attach(one, graph=True) as attachment:
        for lengths in ((40, 20), (17, 30)):
            tokens, mask = (part.to(device) for part in prompt(*lengths))
            generate(one, tokens, mask)
            assert min(layer.compressions for layer in attachment.report().layers) > 5
    assert len(seen) == 44
    assert all(other == seen[0] for other in seen)


def test_what_is_reported_in_bytes_is_what_is_held(steps):
    with small("h2o").attach(model(), graph=True) as attachment:
        cache = attachment.cache()
        generate(model(), *prompt(40, 20), past_key_values=cache)
        reported = attachment.report()
    stored = [layer.storage.nbytes for layer in cache.managed]
    assert [layer.entry_bytes for layer in reported.layers] == stored
    slots, entry = 2 * 2 * (12 + 4), 2 * 8 * 4 + 4 + 2 * 4  # rows, heads, slots; key and value, position, attention
    assert stored == [slots * entry] * 3


def test_the_storage_serves_one_generation_after_the_other_and_caches_are_let_go(steps):
    with small("rkv").attach(model(), graph=True):
        gc.collect()
        for _ in range(3):
            generate(model(), *prompt(30, 20), return_dict_in_generate=False, output_logits=False)
            assert not any(one() for one in steps[-1]._entered), "the cache outlives its generation"
    assert len(set(map(id, steps))) == 1


def test_another_batch_has_a_storage_of_its_own(steps):
    with small("rkv").attach(model(), graph=True):
        for lengths in ((30,), (30, 20), (30,)):
            generate(model(), *prompt(*lengths))
    assert [session.rows for session in dict.fromkeys(steps)] == [1, 2, 1]


def test_what_an_earlier_cache_has_left_is_never_seen(steps):
    tokens, mask = prompt(7)
    decisions = Decisions()
    with small("snapkv").attach(model()), decisions.watched():
        expected = generate(model(), tokens, mask)
    with small("snapkv").attach(model(), graph=True):
        generate(model(), *prompt(30), return_dict_in_generate=False, output_logits=False)
        for layer in steps[-1].layers:
            for tensor in layer.storage.tensors.values():
                tensor.fill_(torch.nan if tensor.is_floating_point() else 3)
        with decisions.followed():
            repeat(expected, slice(None), model(), tokens, mask)
    assert len(set(map(id, steps))) == 1


def test_there_is_room_until_the_longest_row_fills_its_slots(steps):
    with small("snapkv").attach(model(), graph=True) as attachment:
        cache = attachment.cache()
        fed(model(), cache, prompt(40, 33)[0], 20, 21, 22, 23)
        session = steps[-1]
        assert session.has_room()
        session.capacities = (16, 16, 15)
        assert session.layers[0].storage.longest == 15
        assert not session.has_room()


def test_other_weights_have_another_storage(steps):
    one = build()
    with small("snapkv").attach(one, graph=True):
        generate(one, *prompt(30))
        one.load_state_dict(build(seed=1).state_dict(), assign=True)
        generate(one, *prompt(30))
    assert len({id(session) for session in steps}) == 2


@attrs.frozen
class Bump(LayerAllocator):
    """Gives the first layer more while a sequence has some lengths."""

    name = "bump"

    def allocate(self, request):
        extra = 6 if 40 <= int(request.tokens) < 50 else 0
        return request.total // 3 + torch.tensor([extra, -extra, 0])[:, None, None]


def test_entries_that_outgrow_the_storage_get_a_larger_one(steps):
    policy = small("snapkv")
    allocate = attrs.evolve(policy.spec.allocate, layers=Bump())
    policy = attrs.evolve(policy, spec=attrs.evolve(policy.spec, allocate=allocate))
    assert_alike(policy, model(), *prompt(30), count=40)
    assert len({id(session) for session in steps}) == 2
    assert [session.capacities for session in dict.fromkeys(steps)] == [(16, 16, 16), (22, 16, 16)]


def test_inference_mode_and_no_grad_share_a_storage(steps):
    one = build()
    with small("snapkv").attach(one, graph=True), torch.inference_mode():
        expected = generate(one, *prompt(30, 20))
        with torch.inference_mode(mode=False):
            found = generate(one, *prompt(30, 20))
    assert torch.equal(expected.sequences, found.sequences)
    assert len(set(map(id, steps))) == 1
