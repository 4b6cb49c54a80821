"""Full caches and policies decode the same model; whole rounds say what compressing costs."""

import attrs
import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy.bench.baselines.contenders import (
    COMPILED,
    DYNAMIC,
    PREALLOCATED,
    STATIC,
    FullCache,
    PolicyContender,
    decoding_at,
    twin,
)
from kvpolicy.bench.baselines.preallocated_cache import PreallocatedCache
from kvpolicy.bench.caches.decoding import fill, fill_until_due
from kvpolicy.bench.cases.decode import DecodeSetup, measure, measure_one
from kvpolicy.bench.cases.overhead import Age, Overhead
from kvpolicy.bench.protocol.case import AGAIN, OURS
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.decode_steps import time_round
from kvpolicy.bench.protocol.interleave import Repetitions
from kvpolicy.bench.protocol.model_shapes import model_shape
from kvpolicy.errors import InputError

CPU = torch.device("cpu")
EVERY = {"compress": {"prefill": True, "every": 8}}


def policy(name="rkv", budget=16, **rest):
    return kvpolicy.load(name, budget=budget, **{**EVERY, **rest})


def setup(*policies, **rest):
    given = {"lengths": (40,), "full": (DYNAMIC, PREALLOCATED, STATIC), "protocol": Repetitions(3, 1), **rest}
    return DecodeSetup(policies or (policy(),), model_shape("tiny"), device=CPU, dtype=torch.float32, **given)


def written(contender, tokens, count):
    cache, found = contender.cache(tokens.shape[1] + count), []
    with contender.open():
        cache = contender.cache(tokens.shape[1] + count)
        for _ in range(count):
            tokens = contender.forward(tokens, cache)
            found.append(tokens)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", [PREALLOCATED, STATIC, "policy"])
def test_all_that_keep_everything_write_the_same_tokens(tiny, name):
    prompt = torch.randint(1, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    other = PolicyContender.of(policy(budget=1000), tiny) if name == "policy" else FullCache(name, tiny)
    if name == "policy":
        with other.open():
            cache, tokens, found = other.cache(32), prompt, []
            for _ in range(12):
                tokens = other.forward(tokens, cache)
                found.append(tokens)
        mine = torch.cat(found, 1)
    else:
        mine = written(other, prompt, 12)

    assert torch.equal(mine, written(FullCache(DYNAMIC, tiny), prompt, 12))
    assert torch.equal(mine, tiny.generate(prompt, max_new_tokens=12, do_sample=False)[:, 20:])


def test_preallocated_storage_stays_where_it_is(tiny):
    cache = PreallocatedCache(tiny.config, 50)
    fill(cache, tiny, 2, 40)
    before = cache.layers[0].keys.data_ptr()
    kept = cache.layers[0].keys.clone()
    keys, _ = cache.update(torch.ones(2, 2, 1, 16), torch.ones(2, 2, 1, 16), 0)

    assert keys.data_ptr() == before
    assert torch.equal(keys[:, :, :40], kept)
    assert keys.shape[2] == cache.get_seq_length() == 41
    assert keys.untyped_storage().nbytes() == 2 * 2 * 50 * 16 * 4


def test_filling_gives_every_cache_the_length(tiny):
    dynamic = DynamicCache(config=tiny.config)
    fill(dynamic, tiny, 1, 30)
    contender = PolicyContender.of(policy(), tiny)
    with contender.open():
        ours = contender.cache(0)
        fill(ours, tiny, 1, 30)

    assert dynamic.get_seq_length() == ours.get_seq_length() == 30
    assert [layer.storage.slots.average for layer in ours.managed] == [16.0, 16.0]


def test_ripe_caches_compress_in_the_next_step(tiny):
    contender = PolicyContender.of(policy(), tiny)
    with contender.open():
        decoding = decoding_at(contender, 2, 30, 20)
        fill_until_due(decoding.cache, tiny, 2)
        before = [one.compressions for one in decoding.cache.stats]
        decoding.step()
        after = [one.compressions for one in decoding.cache.stats]

    assert after == [one + 1 for one in before]


def test_static_shapes_write_the_same_tokens_and_compress_as_often(tiny):
    found = []
    for graph in (False, True):
        contender = PolicyContender.of(policy("snapkv", 40), tiny, graph=graph)
        with contender.open():
            decoding = decoding_at(contender, 2, 60, 40)
            tokens = []
            for _ in range(20):
                decoding.step()
                tokens.append(decoding.tokens)
            found.append((torch.cat(tokens, 1).tolist(), [one.compressions for one in decoding.cache.stats]))

    assert found[0] == found[1]
    assert found[0][1] == [3, 3]  # the prompt, then twice after eight tokens


def test_twins_share_weights_and_nothing_else(tiny):
    other = twin(tiny)
    with policy().attach(other):
        assert tiny.config._attn_implementation != other.config._attn_implementation
    assert all(a is b for a, b in zip(tiny.parameters(), other.parameters(), strict=True))


def test_a_contender_is_opened_before_use(tiny):
    with pytest.raises(RuntimeError, match="used before it was opened"):
        PolicyContender.of(policy(), tiny).cache(10)


def test_a_case_per_policy_with_all_full_caches(tiny, scripted, left_out):
    found = dict(measure(setup(policy(), policy("snapkv", 40)), tiny, scripted(1.0), Deadline(), left_out))
    cases = found["40 tokens"]

    assert [case.what for case in cases] == ["rkv", "snapkv"]
    assert set(cases[0].samples) == {OURS, AGAIN, DYNAMIC, PREALLOCATED, STATIC}
    assert cases[0].samples[DYNAMIC] == cases[1].samples[DYNAMIC]
    assert cases[0].facts["held_bytes"][OURS] < cases[0].facts["held_bytes"][DYNAMIC]
    assert cases[0].facts["compression_share"] == 0.0
    assert left_out == []


def test_a_policy_that_cannot_be_timed_is_left_out(tiny, scripted, left_out):
    calibrated = kvpolicy.load("sals25")
    cases = measure_one(setup(policy(), calibrated), tiny, 40, scripted(), Deadline(), left_out)

    assert [case.what for case in cases] == ["rkv"]
    assert "calibration" in left_out[0][1]


def test_without_time_lengths_are_left_out(tiny, scripted, left_out):
    found = list(measure(setup(), tiny, scripted(), Deadline(0.0), left_out))

    assert found == [("40 tokens", [])]
    assert left_out == [("40 tokens", "no time was left")]


def test_nothing_is_compiled_without_time_for_it(tiny, scripted, left_out):
    only = setup(full=(DYNAMIC, COMPILED))
    (case,) = measure_one(only, tiny, 40, scripted(), Deadline.within(50.0), left_out)

    assert set(case.samples) == {OURS, AGAIN, DYNAMIC}
    assert left_out[0][0] == COMPILED


class SlowCompressions:
    """A clock on which a step takes 1 s, and 5 s when it compresses."""

    def __init__(self, cache):
        self._cache = cache

    def time(self, call):
        before = sum(one.compressions for one in self._cache.stats)
        call()
        return 5.0 if sum(one.compressions for one in self._cache.stats) > before else 1.0


def test_a_whole_round_has_one_compression_and_knows_its_share(tiny):
    contender = PolicyContender.of(policy(), tiny)
    with contender.open():
        decoding = decoding_at(contender, 1, 30, 20)
        found = time_round(decoding, SlowCompressions(decoding.cache))

    assert found == {"mean_step_seconds": 12 / 8, "compressing_steps": 1, "compression_share": 4 / 12}


@pytest.mark.parametrize("every", [1, 1000])
def test_no_whole_rounds_of_policies_that_compress_always_or_hardly_ever(tiny, every, scripted):
    contender = PolicyContender.of(policy(compress={"prefill": True, "every": every}), tiny)
    with contender.open():
        assert time_round(decoding_at(contender, 1, 30, 20), scripted()) == {}


def test_attaching_without_evicting_is_compared_with_the_plain_model(tiny, scripted):
    case = Overhead(policy(budget=10_000), 30, Repetitions(3, 1)).measure(tiny, scripted(1.0))

    assert set(case.samples) == {OURS, AGAIN, DYNAMIC}
    assert case.ratio(DYNAMIC) == 1.0


def test_old_and_young_sequences_hold_as_much_and_compress_together(tiny, monkeypatch):
    seen = {}
    generated = Age._generated

    def watched(self, contender, tokens):
        seen[tokens] = decoding = generated(self, contender, tokens)
        return decoding

    monkeypatch.setattr(Age, "_generated", watched)
    case = Age(policy(), young=32, old=160, protocol=Repetitions(3, 1)).measure(tiny, SameForAll())
    young, old = seen[32].cache, seen[160].cache

    assert (young.get_seq_length(), old.get_seq_length()) == (36, 164)
    assert [one.held for one in young.stats] == [one.held for one in old.stats]
    assert set(case.samples) == {OURS, "young", "young again"}


class SameForAll:
    def time(self, call):
        call()
        return 1.0


@pytest.mark.parametrize(
    "wrong", [{"lengths": ()}, {"lengths": (0,)}, {"rows": 0}, {"policies": ()}, {"policies": (policy(), policy())}]
)
def test_bad_setups_are_refused(wrong):
    with pytest.raises(InputError):
        attrs.evolve(setup(), **wrong)
