"""Caches in steps of fixed shapes: taking turns, undone, moved, copied, and after their attachment."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest
import torch

from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.errors import CacheError
from kvpolicy.spec.policy import Weighted
from kvpolicy.stages import Scorer
from tests.integration.static_steps import TOLERANCE, assert_alike, fed
from tests.support.alone import repeat
from tests.support.decisions import Decisions
from tests.support.models import build, generate, model, prompt
from tests.support.policies import held, small


@attrs.frozen
class Labelled(Scorer):
    """What is in a region is worth most, then what is new."""

    name = "labelled"

    def score(self, view):
        labels = 0 if view.regions is None else view.regions
        return view.positions + 1000.0 * labels


def test_two_caches_take_turns():
    texts = [prompt(30, seed=seed)[0] for seed in (0, 1)]
    alone, decisions = {}, Decisions()
    for graph, mode, turns in (
        (False, decisions.watched, [0] * 9),
        (False, decisions.watched, [1] * 9),
        (True, decisions.followed, [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0]),
    ):
        with small("gkv").attach(model(), graph=graph) as attachment, mode(), torch.no_grad():
            caches, said = [attachment.cache() for _ in texts], {0: [], 1: []}
            for turn in turns:
                cache, start = caches[turn], caches[turn].get_seq_length()
                fed = texts[turn][:, start : start + 1] if start else texts[turn][:, :20]
                said[turn].append(model()(fed, past_key_values=cache).logits[:, -1])
        for turn in set(turns):
            logits = torch.cat(said[turn])
            expected = alone.setdefault(turn, logits)
            assert logits.shape == expected.shape
            assert (logits - expected).abs().max() <= TOLERANCE


def conversation(graph):
    """Two turns, with tokens undone in between and rows moved; logits of all forwards, and what is held in the end."""
    one, tokens, said = model(), prompt(60, 60)[0], []
    with small("snapkv", every=8).attach(one, graph=graph) as attachment:
        cache = attachment.cache()
        said += fed(one, cache, tokens, 20, *range(21, 27))
        cache.crop(-2)
        said += fed(one, cache, tokens, *range(25, 33))
        said += fed(one, cache, tokens, 40, *range(41, 47))
        cache.reorder_cache(torch.tensor([1, 0]))
        said += fed(one, cache, tokens, *range(47, 53))
        cache.batch_select_indices(torch.tensor([1]))
        said += fed(one, cache, tokens[1:], *range(53, 61))
    return torch.cat(said), held(cache)


def test_turns_rollbacks_and_moved_rows_come_in_between(steps):
    decisions = Decisions()
    with decisions.watched():
        free, ours = conversation(graph=False)
    with decisions.followed():
        fixed, theirs = conversation(graph=True)
    assert (free - fixed).abs().max() <= TOLERANCE
    assert ours == theirs
    assert len(steps) == 5 + 7 + 5 + 5 + 7  # all decode steps but the first of each stretch


def test_tokens_that_may_be_undone_are_left_to_the_model(steps):
    tokens, found, decisions = prompt(50)[0], [], Decisions()
    for graph, mode in ((False, decisions.watched), (True, decisions.followed)):
        with small("snapkv").attach(model(), graph=graph) as attachment, mode(), torch.no_grad():
            cache = attachment.cache()
            fed(model(), cache, tokens, 20, *range(21, 26))
            cache.activate_past_recording()
            fed(model(), cache, tokens, *range(26, 33))  # an eviction would be due
            cache.crop(-5)
            cache.stop_recording()
            found.append(torch.cat(fed(model(), cache, tokens, *range(28, 41))))
    assert (found[0] - found[1]).abs().max() <= TOLERANCE
    assert len(steps) == 4 + 12


def test_threads_take_turns():
    texts, decisions = [prompt(30, 21, seed=seed) for seed in (0, 1)], Decisions()
    with small("rkv").attach(model()), decisions.watched():
        expected = [generate(model(), *text) for text in texts]
    with small("rkv").attach(model(), graph=True), decisions.followed(), ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda text, theirs: repeat(theirs, slice(None), model(), *text), texts, expected))


def test_a_copied_cache_goes_its_own_way(steps):
    one, tokens = model(), prompt(40, seed=2)[0]
    with small("rkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache = attachment.cache()
        fed(one, cache, tokens, 20, *range(21, 26))
        assert steps
        other = copy.deepcopy(cache)
        ends = [torch.cat(fed(one, each, tokens, *range(26, 34))) for each in (cache, other)]
        assert held(cache) == held(other)
    assert (ends[0] - ends[1]).abs().max() <= TOLERANCE


def test_a_cache_goes_on_after_its_attachment(steps):
    one, tokens = build(), prompt(40)[0]
    with small("snapkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache = attachment.cache()
        fed(one, cache, tokens, 20, *range(21, 26))
    assert steps
    assert cache.get_seq_length() == 25
    assert max(held(cache)[0][0][0]) == 24
    cache.check_integrity()


@pytest.mark.parametrize("steps_since", [1, 2, 4])
def test_what_a_step_of_fixed_shapes_has_evicted_cannot_be_undone(steps_since, steps):
    """An eviction falls at 20, 24 and so on: up to there tokens can be taken back, and not one more."""
    one, tokens, end = model(), prompt(40)[0], 28 + steps_since - 1
    with small("snapkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache = attachment.cache()
        fed(one, cache, tokens, 20, *range(21, end + 1))
        since = (end - 20) % 4
        assert steps
        assert cache.stats[0].held == 12 + since
        with pytest.raises(CacheError, match=f"cannot undo {since + 1} tokens"):
            cache.crop(-since - 1)
        cache.crop(-since)
        assert cache.get_seq_length() == end - since


@pytest.mark.parametrize("shortest", [5, 13])
def test_budgets_that_move_from_layer_to_layer_reach_the_device_at_every_step(shortest, steps):
    """The same layers are due in every step, each time with other budgets: the pyramid gets steeper as tokens come."""
    assert_alike(small("pyramidkv", every=1), model(), *prompt(shortest), count=30)
    assert len(steps) == 28


def test_a_cache_may_be_read_between_steps_and_stays_in(steps):
    """What layers say of themselves is that of steps of any shape, after every step, and the device is not asked."""
    tokens, decisions, said = prompt(40, 33)[0], Decisions(), []
    for graph, mode in ((False, decisions.watched), (True, decisions.followed)):
        with small("gkv").attach(model(), graph=graph) as attachment, mode():
            cache, now = attachment.cache(), []
            fed(model(), cache, tokens, 20, 21)
            for end in range(22, 36):
                fed(model(), cache, tokens, end)
                cache.check_integrity()
                layers = [(one.seq_len, one.held, one.compressions) for one in attachment.report().layers]
                state = [(one.num_tokens, one.compressed, one.rollback_limit, one.entries) for one in cache.managed]
                windows = [one.window.last([0, 1])[1].tolist() for one in cache.managed if one.window.size]
                now.append((held(cache), layers, state, windows))
                assert cache.fork().managed[0].num_tokens == cache.managed[0].num_tokens
            said.append(now)
    assert said[0] == said[1]
    assert len(steps) == 14
    assert len({id(layer.storage) for layer in cache.managed} & {id(one.storage) for one in steps[-1].layers}) == 3


def test_a_change_by_the_layer_itself_takes_the_entries_along(steps):
    one, tokens = model(), prompt(40)[0]
    with small("snapkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache = attachment.cache()
        fed(one, cache, tokens, 20, 21, 22, 23)
        static, before = steps[-1].layers, attachment.report().parts
        assert all(layer.storage is ours.storage for layer, ours in zip(cache.managed, static, strict=True))
        cache.crop(-1)
        own = {id(layer.storage) for layer in cache.managed} | {id(layer.window) for layer in cache.managed}
        assert not own & {id(part) for ours in static for part in (ours.storage, ours.window)}
        spare = sum(ours.storage.nbytes + ours.window.nbytes for ours in static)
        assert attachment.report().parts["static"] == before["static"] + spare  # beside what the cache now has
        fed(one, cache, tokens, 23, 24)
        assert all(layer.storage is ours.storage for layer, ours in zip(cache.managed, static, strict=True))
        assert attachment.report().parts["static"] == before["static"]


def test_a_cache_in_steps_of_fixed_shapes_can_be_pickled(steps):
    one, tokens = model(), prompt(40)[0]
    with small("rkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache = attachment.cache()
        fed(one, cache, tokens, 20, 21, 22, 23)
        state = pickle.loads(pickle.dumps(cache.managed[0].__getstate__()["state"]))  # noqa: S301 our own
        assert type(state.storage) is SegmentedStorage
        assert state.storage.lengths == cache.managed[0].storage.lengths
        assert state.storage.positions(0, 1).tolist() == held(cache)[0][0][1]


def test_regions_are_shown_to_plugins_by_steps_of_any_shape(steps):
    """Those of fixed shapes serve all caches, and know the regions of none."""
    policy = small("snapkv")
    policy = attrs.evolve(policy, spec=attrs.evolve(policy.spec, score=(Weighted(Labelled()),)))
    tokens, kept = prompt(40)[0], []
    for graph in (False, True):
        with policy.attach(model(), graph=graph) as attachment:
            cache = attachment.cache(regions={"tools": (4, 9)})
            fed(model(), cache, tokens, 20, *range(21, 35))
            kept.append(held(cache))
    assert kept[0] == kept[1]
    assert {4, 5, 6, 7, 8} <= set(kept[1][0][0][0])
    assert not steps
