"""Spans of a request that a policy protects or a plugin sees: the first prompt, and regions by name."""

import copy
from functools import partial

import attrs
import pytest
import torch

from kvpolicy.cache.request.regions import Regions
from kvpolicy.errors import BudgetWarning, CacheError, PolicyError, RegionError
from kvpolicy.policy import Policy
from kvpolicy.spec.policy import Weighted
from kvpolicy.spec.traits import needs
from kvpolicy.stages import Scorer
from tests.integration.test_eviction import DECODING, assert_as_if_masked
from tests.support.alone import assert_rows_alone
from tests.support.models import difference, generate, model, prompt
from tests.support.policies import held, small

REGIONS = {"system": (2, 7), "tools": [(12, 15), (20, 22)]}
JOINT = {"allocate": {"joint": "global"}}
SYSTEM, TOOLS = set(range(2, 7)), {12, 13, 14, 20, 21}


def protecting(name="snapkv", budget=14, every=4, **what):
    rest = {key: what.pop(key) for key in ("allocate", "store", "merge") if key in what}
    return small(name, budget, every, protect={"sinks": 1, "recent": 3, **what}, **rest)


def slots_of(cache):
    return [set(slots) for rows in held(cache) for heads in rows for slots in heads]


def run(policy, lengths=(40,), count=12, regions=REGIONS, **options):
    """The positions that each head of each layer and row holds after a generation."""
    with policy.attach(model()) as attachment:
        cache = attachment.cache(regions=regions)
        generate(model(), *prompt(*lengths), count=count, past_key_values=cache, **options)
        cache.check_integrity()
        return slots_of(cache)


@pytest.mark.parametrize("name", ["snapkv", "rkv", "h2o", "adakv", "streaming_llm", "gkv"])
def test_a_protected_region_stays_in_every_head(name):
    for lengths in ((40,), (40, 29)):
        assert all(slots >= SYSTEM for slots in run(protecting(name, regions=["system"]), lengths))


def test_other_regions_are_evicted_like_anything_else():
    assert not all(slots >= TOOLS for slots in run(protecting(regions=["system"])))
    assert all(slots >= SYSTEM | TOOLS for slots in run(protecting(regions=["system", "tools"])))


def test_the_budget_counts_protected_regions():
    with protecting(regions=["system", "tools"]).attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache(regions=REGIONS)
        attachment.model(prompt(40)[0], past_key_values=cache)
        assert {len(slots) for slots in slots_of(cache)} == {14}


@pytest.mark.parametrize("rest", [{}, JOINT, {"store": {"use": "rotation", "batch": 2}}, {"merge": "keepkv"}], ids=str)
@pytest.mark.parametrize("chunks", [None, 9])
def test_the_first_prompt_stays_and_what_comes_after_it_is_evicted(chunks, rest):
    policy = protecting(budget=30, prompt=True, **rest)
    options = {} if chunks is None else {"prefill_chunk_size": chunks}
    found = run(policy, (22,), 40, None, **options)
    assert all(slots >= set(range(22)) for slots in found)
    assert sum(map(len, found)) <= len(found) * (30 + 3)
    assert max(max(slots) - len(slots) for slots in found) > 20


@pytest.mark.parametrize("rest", [{}, JOINT], ids=str)
def test_a_prompt_beyond_the_budget_is_said_once_and_memory_stays_bounded(rest):
    message = "the budget of 22 tokens is 12 entries, but 22 are held because they are protected"
    with pytest.warns(BudgetWarning, match=message) as said:
        found = run(protecting(budget=12, prompt=True, **rest), (22,), 40, None)
    assert len(said) == 1
    assert all(slots >= set(range(22)) for slots in found)
    assert sum(map(len, found)) <= len(found) * (22 + 3 + 3)


@pytest.mark.parametrize("lengths", [(22,), (22, 15)])
def test_candidates_that_come_with_the_prompt_are_not_of_it(lengths):
    """They are taken as decoding alone would take them: each evicts what it would evict there."""
    tokens, mask = prompt(*lengths)
    more = torch.randint(1, 90, (len(lengths), 8), generator=torch.Generator().manual_seed(2))
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    with protecting(budget=27, every=1, prompt=True).attach(model()) as attachment, torch.no_grad():
        alone = attachment.cache()
        attachment.model(tokens, attention_mask=mask, past_key_values=alone)
        expected = torch.cat(
            [
                attachment.model(
                    more[:, step : step + 1], attention_mask=longer[:, : 22 + step + 1], past_key_values=alone
                ).logits
                for step in range(8)
            ],
            1,
        )
        cache = attachment.cache()
        cache.activate_past_recording()
        cache.expect_prompt(22)
        whole = torch.cat([tokens, more], 1)
        found = attachment.model(whole, attention_mask=longer, past_key_values=cache).logits[:, 22:]
        cache.stop_recording()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert slots_of(cache) == slots_of(alone)


def test_a_second_turn_is_not_the_first_prompt():
    with protecting(budget=24, prompt=True).attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache()
        for start, stop in ((0, 12), (12, 40)):
            attachment.model(prompt(40)[0][:, start:stop], past_key_values=cache)
        assert all(slots >= set(range(12)) and len(slots) == 24 for slots in slots_of(cache))


def test_rows_have_regions_of_their_own_and_take_them_along():
    """Through beams, reordering, copies and selections."""
    rows = [{"system": (2, 7)}, {"system": [(0, 2), (10, 13)]}]
    expected = [set(range(2, 7)), {0, 1, 10, 11, 12}]
    with protecting(regions=["system"]).attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache(regions=rows)
        attachment.model(prompt(40, 40)[0], past_key_values=cache)
        other = copy.deepcopy(cache)
        other.batch_select_indices(torch.tensor([1, 1, 0]))
        for _ in range(9):
            attachment.model(torch.full((3, 1), 5), past_key_values=other)
            attachment.model(torch.full((2, 1), 5), past_key_values=cache)
        for each, order in ((cache, (0, 1)), (other, (1, 1, 0))):
            for layer in held(each):
                for row, heads in zip(order, layer, strict=True):
                    assert all(set(slots) >= expected[row] for slots in heads)
    beams = run(protecting(regions=["system"]), (40, 40), 8, rows, num_beams=3)
    per_layer = [beams[start : start + 12] for start in range(0, len(beams), 12)]
    for heads in per_layer:  # six rows of two heads: three beams of each prompt
        assert all(slots >= expected[0] for slots in heads[:6])
        assert all(slots >= expected[1] for slots in heads[6:])


@pytest.mark.parametrize("name", ["snapkv", "h2o", "adakv"])
def test_logits_are_those_of_the_plain_model_that_sees_what_is_held(name):
    policy = protecting(name, regions=["tools"], prompt=False)

    class Given:
        """A policy whose caches have regions."""

        def attach(self, one):
            attachment = policy.attach(one)
            attachment.cache = partial(attachment.cache, regions=REGIONS)
            return attachment

    assert_as_if_masked(Given(), model(), DECODING)


@pytest.mark.parametrize("what", [{"regions": ["system", "tools"]}, {"prompt": True}], ids=str)
def test_a_row_of_a_padded_batch_equals_its_own_run(what):
    with protecting(budget=46, **what).attach(model()) as attachment:
        attachment.cache = partial(attachment.cache, regions=REGIONS)
        decisions = assert_rows_alone(model(), attachment, *prompt(40, 29, 17))
    assert decisions.repeated


def test_no_bit_changes_while_the_budget_holds_everything():
    tokens, mask = prompt(40, 29)
    plain = generate(model(), tokens, mask)
    with protecting(budget=500, prompt=True, regions=["system"]).attach(model()) as attachment:
        found = generate(model(), tokens, mask, past_key_values=attachment.cache(regions=REGIONS))
    assert difference(found, plain) == 0


@attrs.frozen
class ByRegion(Scorer):
    """Keeps what is in the second region."""

    name = "by_region"

    def score(self, view):
        return (view.regions == 2).float()


def test_plugins_see_regions():
    spec = small("snapkv", 10, 4, protect={"sinks": 0, "recent": 2}).spec
    policy = Policy(attrs.evolve(spec, score=(Weighted(ByRegion()),)))
    assert all(slots >= TOOLS for slots in run(policy, (40, 29)))


def fading(region, **how):
    """Attention of the newest queries, lowered in a region."""
    score = {"use": "by_region", "region": region, "of": {"use": "attention", "queries": 8}, **how}
    return small("snapkv", 14, 4, protect={"recent": 3}, score=[score])


@pytest.mark.parametrize("lengths", [(40,), (40, 33)], ids=str)
def test_what_weighs_nothing_goes_first(lengths):
    regions = {"thinking": [(8, 20), (22, 31)]}
    thinking = {*range(8, 20), *range(22, 31)}
    ordinary = run(fading("thinking", share=1), lengths, regions=regions)
    assert any(slots & thinking for slots in ordinary)
    assert not any(slots & thinking for slots in run(fading("thinking", share=0), lengths, regions=regions))


@pytest.mark.parametrize("lengths", [(40,), (40, 33)], ids=str)
def test_of_what_goes_first_the_newest_span_stays_as_it_was(lengths):
    """The span that is named and has not come yet is not the newest."""
    regions, older, newest = {"thinking": [(8, 20), (22, 31), (90, 95)]}, {*range(8, 20)}, {*range(22, 31)}
    held = run(fading("thinking", share=0, newest=1), lengths, regions=regions)
    assert not any(slots & older for slots in held)
    assert any(slots & newest for slots in held)


def test_a_policy_that_reads_a_region_needs_it():
    policy = fading("thinking", half_life=8)
    assert "regions of the request" in needs(policy.spec)
    with policy.attach(model()) as attachment:
        with pytest.raises(RegionError, match=r"the policy names regions \(thinking\), but none is given"):
            attachment.cache()
        with pytest.raises(RegionError, match="no region 'thinking' is given"):
            attachment.cache(regions=REGIONS)
        attachment.cache(regions={"thinking": []})
    with pytest.raises(PolicyError, match="score: graph: no regions can be read: thinking"):
        policy.attach(model(), graph=True)


@pytest.mark.parametrize("fork", [False, True])
def test_regions_of_later_turns_are_added(fork):
    """Of tokens that are held, and of those that are about to come; what was given before stays as it is."""
    with protecting(budget=20, regions=["tools"]).attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache(regions={"system": (2, 7), "tools": (12, 15)})
        attachment.model(prompt(40)[0], past_key_values=cache)
        cache.add_regions({"answer": (40, 42), "tools": [(38, 40), (43, 45)]})
        cache = cache.fork() if fork else cache
        for _ in range(20):
            attachment.model(torch.tensor([[5]]), past_key_values=cache)
    assert cache.spans.regions.names == ("system", "tools", "answer")
    assert all(slots >= {12, 13, 14, 38, 39, 43, 44} for slots in slots_of(cache))
    assert not all(slots >= {40, 41} for slots in slots_of(cache))


def test_regions_are_added_to_a_cache_without_any_and_for_each_row():
    with small("snapkv", 14, 4).attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache()
        attachment.model(*prompt(20, 20)[:1], past_key_values=cache)
        cache.add_regions([{"a": (0, 3)}, {"a": (1, 2)}])
        cache.add_regions({"b": (5, 6)})
    assert cache.spans.regions.rows == (((1, 0, 3), (2, 5, 6)), ((1, 1, 2), (2, 5, 6)))


def test_regions_that_cannot_be_added_change_nothing():
    with protecting(regions=["system"]).attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache(regions=REGIONS)
        with pytest.raises(CacheError, match="the cache is empty: it can be given regions once it has seen tokens"):
            cache.add_regions({"more": (40, 44)})
        attachment.model(prompt(40)[0], past_key_values=cache)
        for wrong, message in (
            ({"more": (4, 44)}, "regions 'system' and 'more' overlap at token 4"),
            ([{"more": (40, 44)}] * 3, "regions of 3 rows do not match a batch of 1"),
            ({"more": "far"}, "region 'more' must be a token range"),
        ):
            with pytest.raises(RegionError, match=message):
                cache.add_regions(wrong)
    assert cache.spans.regions == Regions.of(REGIONS)


def test_bytes_of_regions_are_counted():
    with protecting(regions=["system"]).attach(model()) as attachment, torch.no_grad():
        for regions in (REGIONS, {**REGIONS, "far": (4000, 4001)}):
            cache = attachment.cache(regions=regions)
            attachment.model(prompt(40)[0], past_key_values=cache)
            first, *others = attachment.report().layers
            beside = first.state_bytes - others[0].state_bytes
            assert beside == (23 if regions is REGIONS else 4002)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (None, r"the policy names regions \(system\), but none is given"),
        ({"sytem": (0, 3)}, "no region 'system' is given; did you mean 'sytem'"),
        ({"system": (0, 5), "tools": (4, 9)}, "regions 'system' and 'tools' overlap at token 4"),
        ({"system": (5, 3)}, "region 'system' must be ranges"),
        ({"system": (-1, 3)}, "region 'system' must be ranges"),
        ({"system": (0.0, 3)}, "region 'system' must be a token range|region 'system' must be ranges"),
        ({"system": "0-3"}, "region 'system' must be a token range"),
        ({"system": [(0, 3, 4)]}, "region 'system' must be ranges"),
        ({}, "regions must have at least one name"),
        ({3: (0, 1)}, "the name of a region must be a word"),
        ([], "regions must be a mapping"),
        ("system", "regions must be a mapping"),
        ({str(n): (n, n + 1) for n in range(200)}, "at most 127 regions: 200"),
    ],
)
def test_wrong_regions_are_refused_when_the_cache_is_made(regions, message):
    with protecting(regions=["system"]).attach(model()) as attachment, pytest.raises(RegionError, match=message):
        attachment.cache(regions=regions)


def test_regions_of_another_batch_are_refused_before_anything_changes():
    with protecting(regions=["system"]).attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache(regions=[REGIONS, REGIONS])
        with pytest.raises(RegionError, match="regions of 2 rows do not match a batch of 3"):
            attachment.model(prompt(40, 40, 40)[0], past_key_values=cache)
        cache.reset()
        attachment.model(prompt(40, 40)[0], past_key_values=cache)
        assert all(slots >= SYSTEM for slots in slots_of(cache))


def test_generate_needs_a_cache_with_the_regions():
    with protecting(regions=["system"]).attach(model()), pytest.raises(RegionError, match=r"none is given: attachment"):
        generate(model(), prompt(40)[0])


def test_fixed_shapes_are_refused():
    for what in ({"prompt": True}, {"regions": ["system"]}):
        with pytest.raises(PolicyError, match="protect: graph: only first and last tokens can be protected"):
            protecting(**what).attach(model(), graph=True)


def test_policies_are_written_and_read_and_old_ones_keep_their_digest():
    policy = protecting(prompt=True, regions=["system", "a b"])
    assert "protect: {sinks: 1, recent: 3, prompt: true, regions: [system, a b]}" in policy.to_yaml()
    assert "prompt" not in protecting().to_yaml()
    assert len({policy.digest, protecting().digest, protecting(prompt=True).digest}) == 3


def test_regions_are_repeated_as_generate_repeats_rows():
    regions = Regions.of([{"a": (0, 1)}, {"a": (1, 2)}])
    assert regions.for_rows(4).rows == (((1, 0, 1),), ((1, 0, 1),), ((1, 1, 2),), ((1, 1, 2),))


@pytest.mark.parametrize("what", [{"regions": ["tools"]}, {"prompt": True}], ids=str)
@pytest.mark.parametrize("name", ["snapkv", "h2o", "streaming_llm"])
def test_protected_entries_stay_where_evicted_ones_leave_holes_that_are_filled(name, what):
    """Entries then stand out of order: what is protected goes by their positions, wherever they stand."""
    prompted = 20 if "prompt" in what else 40
    policy, stays = protecting(name, 28, **what), set(range(20)) if "prompt" in what else TOOLS
    with policy.attach(model()) as attachment:
        cache = attachment.cache(regions=REGIONS)
        generate(model(), *prompt(prompted, prompted - 9), count=40, past_key_values=cache)
        assert attachment.plan.fills_holes
        assert not any(layer.in_order for layer in cache.managed)
        cache.check_integrity()
        for layer in held(cache):
            for row, heads in enumerate(layer):
                own = {place for place in stays if "regions" in what or place < prompted - 9 * row}
                assert all(set(slots) >= own for slots in heads)
