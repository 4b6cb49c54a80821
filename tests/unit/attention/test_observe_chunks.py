"""What a scorer is shown of chunks of tokens, against loops over rows, heads and entries."""

import math

import attrs
import pytest
import torch

from kvpolicy.attention import blockwise
from kvpolicy.errors import PluginContractError
from kvpolicy.plan.plan import POSITIONS
from kvpolicy.spec.policy import Weighted
from kvpolicy.stages import Needs, Scorer, State
from kvpolicy_plugins.scorers.attention_based.chunk_attention import ChunkAttention
from kvpolicy_plugins.scorers.history import History
from tests.support import storage as stored
from tests.support.driving import GROUP, HEADS, feed, new_layer, plan_of, random_entries
from tests.support.policies import small

CHUNK, START, COUNT, ROWS = 6, 3, 44, 2
STATE = "score[1].excess"
FORMS = {
    "even": {},
    "ragged": {"allocate": {"heads": {"use": "adaptive", "floor": 0.1}}},
    "packed": {"store": {"use": "kivi", "bits": 4, "group": 2, "residual": 2}},
    "votes": {"merge": {"use": "keepkv", "threshold": -1, "window": 4}},
}


def layer_of(form="even", scorer=None, **given):
    """A layer of two rows that evicts by attention, and observes chunks beside it."""
    policy = small("snapkv", **FORMS[form], **given)
    scorer = scorer or ChunkAttention(CHUNK, START, scaled=True)
    spec = attrs.evolve(policy.spec, score=(*policy.spec.score, Weighted(scorer)))
    return new_layer(plan_of(attrs.evolve(policy, spec=spec)))


def entries(seed=0):
    return random_entries(torch.Generator().manual_seed(seed), ROWS, COUNT)


def drive(layer, tensors, *sizes, valid=None):
    """Forwards of these sizes."""
    start = 0
    for size in sizes:
        own = [tensor[:, :, start : start + size] for tensor in tensors]
        feed(layer, *own, None if valid is None else valid[:, start : start + size], scaling=0.5)
        start += size


def queries_by_position(queries, valid=None):
    """Of each row, the queries [H, D] of its tokens."""
    given = torch.ones(queries.shape[0], queries.shape[2], dtype=torch.bool) if valid is None else valid
    return [queries[row][:, given[row]].transpose(0, 1) for row in range(queries.shape[0])]


def loop(layer, row, head, queries, chunk):
    """What each entry of a chunk gets from the queries of the entries of the chunk that the head holds."""
    positions = layer.storage.slots.segment(POSITIONS, row, head).tolist()
    keys = stored.segment(layer.storage, "keys", row, head)
    columns = layer.storage.slots.columns
    votes = layer.storage.slots.segment("log_votes", row, head).tolist() if "log_votes" in columns else [0] * len(keys)
    shown = [slot for slot, position in enumerate(positions) if position in chunk]
    received = dict.fromkeys(shown, 0.0)
    for slot in shown:
        for each in range(GROUP):
            query = queries[row][positions[slot], head * GROUP + each] * 0.5
            weights = {other: math.exp(query @ keys[other] + votes[other]) for other in shown}
            for other, weight in weights.items():
                received[other] += weight / sum(weights.values()) / GROUP
    return {positions[slot]: value for slot, value in received.items()}


def received(layer, row, head):
    positions = layer.storage.slots.segment(POSITIONS, row, head).tolist()
    return dict(zip(positions, (1 + layer.storage.slots.segment(STATE, row, head)).tolist(), strict=True))


@pytest.mark.parametrize("blocks", [1, 2**20])
@pytest.mark.parametrize("form", FORMS)
def test_a_chunk_that_is_complete_is_that_of_a_loop(form, blocks, monkeypatch):
    """Its first entries came before the compressions, and some of them are gone, or merged, or packed."""
    monkeypatch.setattr(blockwise, "_LOGITS", blocks)
    layer = layer_of(form, ChunkAttention(15, START, scaled=True))
    drive(layer, entries(), 30, 1, 1)
    tensors = [tensor[:, :, 32:] for tensor in entries()]
    before = [[received(layer, row, head) for head in range(HEADS)] for row in range(ROWS)]

    drive(layer, tensors, 1)  # position 32, the last of the chunk from 18 on; nothing is evicted behind it

    chunk, queries = range(18, 33), queries_by_position(entries()[2])
    assert max(layer.entries) > 2 * 12
    for row in range(ROWS):
        for head in range(HEADS):
            found, expected = received(layer, row, head), loop(layer, row, head, queries, chunk)
            assert 32 in expected
            assert len(expected) < len(chunk)
            assert {p: found[p] for p in expected} == pytest.approx(expected, rel=1e-4)
            assert sum(expected.values()) == pytest.approx(len(expected))
            others = {position: value for position, value in found.items() if position not in chunk}
            assert others == {position: before[row][head][position] for position in others}


def test_a_chunk_that_is_not_complete_is_seen_before_a_compression():
    layer = layer_of(every=20)
    drive(layer, entries(), 30, 10)
    queries = queries_by_position(entries()[2])
    newest = [position for position in received(layer, 0, 0) if position >= 39]
    assert newest == [39]
    assert received(layer, 0, 0)[39] == pytest.approx(1.0)  # alone in its chunk
    drive(layer, [tensor[:, :, 40:] for tensor in entries()], 1, 1)
    assert received(layer, 1, 1)[41] == 1.0  # not seen
    layer.before_compression()
    for row in range(ROWS):
        for head in range(HEADS):
            expected = loop(layer, row, head, queries, range(39, 45))
            assert len(expected) == 3
            assert {p: received(layer, row, head)[p] for p in expected} == pytest.approx(expected, rel=1e-4)


PADS = {  # of both rows
    "none": ((), ()),
    "before": ((), (0, 1, 2)),
    "between": ((), (5, 6, 17, 30, 43)),
    "of both": ((31, 33, 35, 42), (39, 40, 41, 42, 43)),
}


@pytest.mark.parametrize("sizes", [(44,), (7, 20, 1, 1, 1, 14), (3, 41), (1,) * 44, (32, 12)])
@pytest.mark.parametrize("pads", PADS.values(), ids=PADS)
def test_forwards_of_any_size_show_the_same_chunks(sizes, pads):
    """As one forward without pads, row by row."""
    valid = torch.ones(ROWS, COUNT, dtype=torch.bool)
    for row, places in enumerate(pads):
        valid[row, list(places)] = False
    layer, tensors = layer_of(budget=100), entries()
    drive(layer, tensors, *sizes, valid=None if bool(valid.all()) else valid)
    layer.before_compression()
    queries = queries_by_position(tensors[2], valid)
    for row in range(ROWS):
        real = int(valid[row].sum())
        for head in range(HEADS):
            found = received(layer, row, head)
            expected = dict.fromkeys(range(START), 1.0)
            for start in range(START, real, CHUNK):
                expected |= loop(layer, row, head, queries, range(start, start + CHUNK))
            assert sorted(expected) == list(range(real))
            assert {p: found[p] for p in expected} == pytest.approx(expected, rel=1e-4)


def test_a_scorer_that_remembers_another_ones_scores_passes_chunks_on():
    layer, tensors = layer_of(scorer=History(ChunkAttention(CHUNK, START, scaled=True)), budget=100), entries()
    drive(layer, tensors, 30)
    expected = loop(layer, 0, 0, queries_by_position(tensors[2]), range(9, 15))
    assert {p: received(layer, 0, 0)[p] for p in expected} == pytest.approx(expected, rel=1e-4)


def test_what_is_not_a_number_is_not_seen():
    layer, tensors = layer_of(budget=100), entries()
    tensors[0][0, 0, 10] = torch.nan
    tensors[2][1, 0, 11] = torch.inf
    drive(layer, tensors, 30)
    assert received(layer, 0, 0)[10] == 1.0  # as if it were in no chunk
    sums = [sum(received(layer, row, 0)[position] for position in range(9, 15)) for row in range(ROWS)]
    assert sums == pytest.approx([6.0, 6.0])
    shares = among([tensor.nan_to_num(0, 0, 0) for tensor in tensors], 1, 0, range(9, 15))
    assert {p: received(layer, 1, 0)[p] for p in shares} == pytest.approx(shares, rel=1e-4)  # as one that prefers none


@attrs.frozen
class Chunked(Scorer):
    """Does what it is told."""

    name = "chunked"

    told: Needs = Needs(chunk=4)
    states: tuple = (State("sum"),)
    sees: object = None

    def needs(self):
        return self.told

    def slot_state(self):
        return self.states

    def observe_chunk(self, query_logits, state):
        return self.sees(query_logits, state)

    def score(self, view):
        return view.positions.float()


WRONG = {
    "needs chunk=-1, expected 0 to": {"told": Needs(chunk=-1)},
    "needs chunk_start without chunk": {"told": Needs(chunk_start=1)},
    "needs chunk=4 and declares no slot state": {"states": ()},
}


def among(tensors, row, head, positions):
    """What tokens of the row get from each other, when none of them is gone."""
    keys, queries = tensors[0][row, head], tensors[2][row]
    received = dict.fromkeys(positions, 0.0)
    for asking in positions:
        for each in range(GROUP):
            weights = [math.exp(0.5 * queries[head * GROUP + each, asking] @ keys[other]) for other in positions]
            for other, weight in zip(positions, weights, strict=True):
                received[other] += weight / sum(weights) / GROUP
    return received


@pytest.mark.parametrize(("budget", "since"), [(20, 30), (100, 31)], ids=["a compression", "a decode step"])
def test_in_a_policy_for_prompts_a_chunk_ends_there(budget, since):
    """No queries are held then, and tokens that follow see each other alone."""
    layer, tensors = layer_of(every="never", budget=budget), entries()
    drive(layer, tensors, 30)  # up to the middle of a chunk
    assert (layer.chunk_window.nbytes > 0) == (budget == 100)
    drive(layer, [tensor[:, :, 30:] for tensor in tensors], *[1] * (since - 30))
    assert layer.chunk_window.nbytes == 0
    assert layer.stats.window_bytes == layer.window.nbytes
    drive(layer, [tensor[:, :, since:] for tensor in tensors], 44 - since)
    layer.before_compression()
    for row in range(ROWS):
        for head in range(HEADS):
            expected = dict.fromkeys((*range(START), *range(30, since)), 1.0)
            chunks = [range(start, min(start + CHUNK, 30)) for start in range(START, 30, CHUNK)]
            for chunk in (*chunks, range(since, 33), range(33, 39), range(39, 44)):
                expected |= among(tensors, row, head, chunk)
            found = received(layer, row, head)
            assert len(found) == min(budget, 44)
            assert found == pytest.approx({position: expected[position] for position in found}, rel=1e-4)


def test_the_queries_that_a_chunk_may_wait_for_are_held_and_counted():
    layer = layer_of(every=100, budget=100)
    drive(layer, entries(), 30)
    assert (layer.plan.chunk_queries, layer.plan.footprint.queries) == (CHUNK - 1, CHUNK - 1 + 32)
    assert layer.chunk_window.nbytes == layer.stats.window_bytes - layer.window.nbytes > 0
    for_prompts = layer_of(every="never").plan
    assert (for_prompts.chunk_queries, for_prompts.footprint.queries) == (CHUNK - 1, 32)


def test_a_row_that_was_compressed_ends_its_chunk_alone():
    """The other row has fewer tokens, and goes on with its own."""
    layer, tensors = layer_of(every="never", budget=28), entries()
    valid = torch.ones(ROWS, COUNT, dtype=torch.bool)
    valid[1, :5] = False
    drive(layer, tensors, 31, 13, valid=valid)
    assert [int(length) for length in layer.storage.lengths[0]] == [28] * HEADS
    alone = layer_of(every="never", budget=28)
    drive(alone, [tensor[1:, :, 5:] for tensor in tensors], 26, 13)
    for head in range(HEADS):
        assert received(layer, 1, head) == pytest.approx(received(alone, 0, head), rel=1e-5)


@pytest.mark.parametrize(("message", "given"), WRONG.items(), ids=WRONG)
def test_what_makes_no_sense_is_refused(message, given):
    with pytest.raises(PluginContractError) as caught:
        layer_of(scorer=Chunked(**given))
    assert message in str(caught.value)


def test_what_was_not_declared_is_refused():
    layer = layer_of(scorer=Chunked(sees=lambda seen, state: {"other": state["sum"]}))
    with pytest.raises(PluginContractError, match="other"):
        drive(layer, entries(), 30)
