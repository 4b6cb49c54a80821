"""Layers whose entries are packed: what attention sees, that rows stay apart, what is held in bytes."""

import attrs
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy.attention.attend import attend
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.plan.calibration import Calibration
from kvpolicy.plan.plan import POSITIONS, compile_policy
from kvpolicy.spec.policy import Weighted
from kvpolicy.stages import Entries, Geometry, Merger, Rotary, Sample
from kvpolicy.stages.registry.plugins import registry
from kvpolicy.stages.slots import gather
from tests.support import driving
from tests.support.decisions import Decisions
from tests.support.driving import feed, new_layer
from tests.support.examples import examples
from tests.support.rounding import PROBES, Noise, close, noisy
from tests.support.storage import segment

HEADS, GROUP, DIM = 2, 2, 8
SCALING = driving.DIM**-0.5  # that of `feed`
STORES = {
    "plain": "plain",
    "kivi": {"use": "kivi", "bits": 4, "group": 4, "residual": 8, "scales": "full", "batch": 1},
    "kivi wide": {"use": "kivi", "bits": 8, "group": 2, "residual": 4, "batch": 2},
    "tada": {"use": "tada", "bits": 4, "residual": 3, "batch": 2},
    "rotation": {"use": "rotation", "bits": 4, "residual": 2, "batch": 1},
    "turboquant": {"use": "turboquant", "residual": 2, "batch": 3},
    "fp8": {"use": "fp8", "residual": 1, "batch": 1},
    "latent": {"use": "latent", "rank": 0.75, "value_bits": 8, "value_group": 8, "residual": 2, "batch": 1},
    "nova_vq": {"use": "nova_vq", "residual": 3, "batch": 2},
}


def plan_of(store, budget="100%", every=4, *, ragged=False, merge="drop", read="all", recent=2, dim=DIM):
    """One layer under the store named, with window votes and attention mass observed."""
    policy = kvpolicy.load(
        "snapkv",
        budget=budget,
        compress={"every": every},
        protect={"recent": recent},
        score=[{"use": "attention", "queries": 4}, {"use": "accumulated_attention", "weight": 0.1}],
        allocate={"heads": {"use": "adaptive", "floor": 0.1}} if ragged else {},
        store=STORES[store],
        merge=merge,
        read=read,
    )
    geometry, rotary = Geometry((0,), HEADS * GROUP, HEADS, dim), Rotary(100.0 ** (-torch.arange(0, dim, 2) / dim))
    calibration = calibration_of(policy, geometry, rotary) if policy.spec.calibrated else None
    return compile_policy(policy.spec, geometry, "cpu", torch.float32, rotary, calibration)


def calibration_of(policy, geometry, rotary):
    keys, values, queries = entries(torch.Generator().manual_seed(9), 2, 40, geometry.head_dim)
    sample = Sample(geometry, SCALING, rotary, queries, keys, values)
    (measured,) = policy.spec.store.calibrate([sample])
    return Calibration(({f"store.{name}": tensor for name, tensor in measured.items()},), "", "")


def entries(generator, rows, count, dim=DIM):
    """Keys, values and queries of a few tokens."""
    keys, values = (torch.randn(rows, HEADS, count, dim, generator=generator) for _ in range(2))
    return keys, values, 2 * torch.randn(rows, HEADS * GROUP, count, dim, generator=generator)


def expected_entries(plan, keys, values):
    """One row's keys and values as they must be seen once all are in: the oldest packed in one go, the newest exact."""
    positions = torch.arange(keys.shape[2]).expand(keys.shape[:3])
    seen = []
    for form, vectors in ((plan.formats[0].keys, keys), (plan.formats[0].values, values)):
        count = form.packed_length(vectors.shape[2])
        old = (
            form.decode(form.encode(vectors[:, :, :count], positions[:, :, :count]), positions[:, :, :count])
            if count
            else vectors[:, :, :0]
        )
        seen.append(torch.cat([old, vectors[:, :, count:]], 2))
    return seen


def rounding_decides(plan, *given):
    """Whether a last bit, which depends on how many entries are packed at one time, decides about a code."""
    noise = Noise(1e-6, torch.Generator().manual_seed(0))
    exact = expected_entries(plan, *given)
    other = [expected_entries(plan, *(noisy(one, noise) for one in given)) for _ in range(PROBES)]
    return not all(close(*pair) for drawn in other for pair in zip(drawn, exact, strict=True))


def attention(queries, positions, keys, values):
    """[1, H, q, D] in float64; query i sees what is at or before `positions[i]`."""
    keys, values = (one.double().repeat_interleave(GROUP, 1) for one in (keys, values))
    logits = queries.double() @ keys.transpose(-1, -2) * SCALING
    hidden = torch.arange(keys.shape[2])[None] > positions[:, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ values


@pytest.mark.parametrize("store", STORES)
@settings(max_examples=examples(15))
@given(
    prompt=st.integers(1, 40), later=st.lists(st.sampled_from([1, 1, 1, 1, 5]), max_size=14), seed=st.integers(0, 99)
)
def test_attention_is_over_packed_past_exact_recent_and_the_new_tokens(store, prompt, later, seed):
    plan = plan_of(store)
    layer, generator = new_layer(plan), torch.Generator().manual_seed(seed)
    keys, values = torch.empty(1, HEADS, 0, DIM), torch.empty(1, HEADS, 0, DIM)
    for count in (prompt, *later):
        new_keys, new_values, queries = entries(generator, 1, count)
        old = expected_entries(plan, keys, values)
        seen = [torch.cat(pair, 2) for pair in zip(old, (new_keys, new_values), strict=True)]
        output = feed(layer, new_keys, new_values, queries)
        expected = attention(queries, torch.arange(keys.shape[2], keys.shape[2] + count), *seen)
        if not torch.allclose(output.double(), expected, atol=1e-5):
            assume(not rounding_decides(plan, keys, values))
            raise AssertionError((output - expected).abs().max())
        keys, values = torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2)
        layer.storage.check_integrity()


MERGES = ("drop", "window_fit", {"use": "keepkv", "window": 4}, "tome")


@pytest.mark.parametrize("store", STORES)
@settings(max_examples=examples(12))
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=3),
    steps=st.integers(0, 14),
    ragged=st.booleans(),
    merge=st.sampled_from(MERGES),
    turn=st.integers(0, 14),
    seed=st.integers(0, 99),
)
def test_a_row_of_a_padded_batch_gives_what_it_gives_alone(store, lengths, steps, ragged, merge, turn, seed):
    joint = STORES[store] != "plain" and STORES[store]["use"] in ("tada", "latent")
    plan = plan_of(store, budget=12, merge=merge, ragged=ragged and not joint)
    longest, generator = max(lengths), torch.Generator().manual_seed(seed)
    prompt = entries(generator, len(lengths), longest)
    valid = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    batch, alone, decisions = new_layer(plan), [new_layer(plan) for _ in lengths], Decisions()
    with decisions.watched():
        output = feed(batch, *prompt, valid)
    for row, length in enumerate(lengths):
        with decisions.followed():
            own = feed(alone[row], *(one[row : row + 1, :, longest - length :] for one in prompt))
        assert torch.allclose(output[row : row + 1, :, longest - length :], own, atol=1e-5)
    for step in range(steps):
        real = (
            torch.ones(len(lengths), 1, dtype=torch.int64) if step != turn else torch.tensor(lengths)[:, None] % 4 + 2
        )
        count = int(real.max())  # another turn brings pads again
        new = entries(generator, len(lengths), count)
        with decisions.watched():
            output = feed(batch, *new, torch.arange(count) >= count - real if count > 1 else None)
        for row, layer in enumerate(alone):
            skipped = count - int(real[row])
            with decisions.followed():
                own = feed(layer, *(one[row : row + 1, :, skipped:] for one in new))
            assert torch.allclose(output[row : row + 1, :, skipped:], own, atol=1e-4)
        batch.storage.check_integrity()
        for store_ in batch.storage.stores:
            store_.check_integrity()
    for row, layer in enumerate(alone):
        for head in range(HEADS):
            together = segment(batch.storage, POSITIONS, row, head)
            assert torch.equal(together[together >= 0], segment(layer.storage, POSITIONS, 0, head))


@pytest.mark.parametrize("store", STORES)
def test_bytes_held_are_those_of_the_formula(store):
    plan = plan_of(store, budget=24, every=8)
    layer, generator = new_layer(plan), torch.Generator().manual_seed(0)
    feed(layer, *entries(generator, 1, 60))
    for _ in range(40):
        feed(layer, *entries(generator, 1, 1))
        assert layer.storage.nbytes == plan.footprint.layer_bytes(0, 24 + 8)
        assert layer.stats.entry_bytes == layer.storage.nbytes


@pytest.mark.parametrize("store", [store for store in STORES if store != "plain"])
def test_what_is_packed_moves_bit_for_bit_when_other_entries_are_evicted(store):
    plan = plan_of(store, budget=24, every=8, recent=8)
    layer, generator = new_layer(plan), torch.Generator().manual_seed(0)
    feed(layer, *entries(generator, 1, 60))
    before = {
        int(p): k
        for p, k in zip(segment(layer.storage, POSITIONS, 0, 0), segment(layer.storage, "values", 0, 0), strict=True)
    }
    packed_lengths = segment(layer.storage, POSITIONS, 0, 0)[: layer.storage.values.packed_lengths[0][0]].tolist()
    for _ in range(8):
        feed(layer, *entries(generator, 1, 1))
    assert layer.stats.compressions == 2
    survivors = 0
    held = zip(segment(layer.storage, POSITIONS, 0, 0).tolist(), segment(layer.storage, "values", 0, 0), strict=True)
    for place, (position, value) in enumerate(held):
        if position in packed_lengths and place < layer.storage.values.packed_lengths[0][0]:
            together = store != "tada" or segment(layer.storage, POSITIONS, 0, 1)[place] == position
            survivors += 1
            if together:
                assert torch.equal(value, before[position])
    assert survivors


@attrs.frozen
class Adding(Merger):
    """Adds 10 to the keys and values of the entries at some positions, and says so."""

    name = "adding"
    positions: tuple[int, ...] = ()

    def merge(self, view, kept):
        there = gather(view.positions, kept)
        changed = (kept >= 0) & torch.isin(there, torch.tensor(self.positions))
        keys, values = (gather(one, kept) + 10 * changed[..., None] for one in (view.keys, view.values))
        return Entries(keys, values, changed=changed)


@pytest.mark.parametrize("changed", [(), (5,), (0, 7)])
@pytest.mark.parametrize("store", [name for name in STORES if name != "plain"])
def test_units_that_were_merged_into_are_packed_anew_and_the_others_not(store, changed):
    """The oldest entries stay where they are, so that their units would be moved bit for bit."""
    plan, generator = plan_of(store, 20, recent=0), torch.Generator().manual_seed(0)
    oldest = Weighted(registry().find("score", "recency")(), weight=-1.0)
    plan = attrs.evolve(plan, spec=attrs.evolve(plan.spec, score=(oldest,), merge=Adding(changed)))
    layer = new_layer(attrs.evolve(plan, spec=attrs.evolve(plan.spec, merge=Adding())))
    feed(layer, *entries(generator, 2, 20))
    before = {name: [[segment(layer.storage, name, row, head).clone() for head in range(HEADS)] for row in range(2)]
              for name in ("keys", "values")}  # fmt: skip
    layer.plan = layer.scheduler.plan = plan
    for _ in range(4):
        feed(layer, *entries(generator, 2, 1))
    assert layer.storage.slots.lengths == ((20, 20),) * 2
    for name, rows in before.items():
        form = getattr(plan.formats[0], name)
        packed_lengths, touched = form.packed_length(20), {position // form.group_size for position in changed}
        assert packed_lengths >= 8
        for row in range(2):
            for head in range(HEADS):
                old, new = rows[row][head], segment(layer.storage, name, row, head)
                assert layer.storage.slots.segment(POSITIONS, row, head)[:20].tolist() == list(range(20))
                for unit in range(packed_lengths // form.group_size):
                    slots = slice(unit * form.group_size, (unit + 1) * form.group_size)
                    if unit not in touched:
                        assert torch.equal(new[slots], old[slots])
                for position in changed:
                    assert (new[position] - old[position]).mean() > 5  # of 10, whatever is lost


def test_a_reader_with_pages_reads_what_attention_would_find_and_keeps_the_rest():
    plan = plan_of("plain", read={"use": "pages", "page": 4, "budget": 8, "dense_first": 0})
    layer, generator = new_layer(plan), torch.Generator().manual_seed(0)
    feed(layer, *entries(generator, 1, 30))
    for count in range(31, 50):
        feed(layer, *entries(generator, 1, 1))
        assert layer.storage.slots.lengths == ((count, count),)
        assert layer.storage.page_summaries.store.lengths == ((count // 4, count // 4),)
    assert 4 <= layer.stats.read <= 12


@pytest.mark.parametrize("store", ["plain", "kivi", "fp8", "tada"])
def test_pages_are_those_of_the_keys_that_are_held(store):
    plan = plan_of(store, budget=16, every=8, read={"use": "pages", "page": 4, "budget": 8, "dense_first": 0})
    layer, generator = new_layer(plan), torch.Generator().manual_seed(0)
    valid = torch.arange(30) >= torch.tensor([[0], [7]])
    feed(layer, *entries(generator, 2, 30), valid)
    for _ in range(20):
        feed(layer, *entries(generator, 2, 1))
        for row in range(2):
            for head in range(HEADS):
                keys = segment(layer.storage, "keys", row, head)
                pages = keys[: keys.shape[0] // 4 * 4].unflatten(0, (-1, 4))
                low = layer.storage.page_summaries.store.segment("minimum", row, head)
                # A page is made when it is full, which may be before its keys are packed.
                assert torch.allclose(low, pages.amin(1), atol=0.3)
                assert store != "plain" or torch.equal(low, pages.amin(1))


@pytest.mark.parametrize("store", STORES)
def test_a_choice_of_all_slots_reads_the_same_as_no_choice(store):
    plan = attrs.evolve(plan_of(store), observers=())
    layer, generator = new_layer(plan), torch.Generator().manual_seed(0)
    feed(layer, *entries(generator, 2, 30), torch.arange(30) >= torch.tensor([[0], [7]]))
    keys, values, queries = entries(generator, 2, 1)
    layer.update(keys, values)
    batch = QueryBatch(queries, layer.place_tokens(None), padded=False, scaling=SCALING)
    positions = layer.storage.column(POSITIONS, layer.storage.everything)
    slots = torch.arange(positions.shape[2]).expand(positions.shape)
    chosen = slots.where(positions >= 0, -1)
    whole = attend(layer.storage, batch, pads=layer.padded)
    assert torch.allclose(attend(layer.storage, batch, chosen, pads=layer.padded), whole, atol=1e-5)
