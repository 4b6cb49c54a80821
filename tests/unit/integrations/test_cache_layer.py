"""One cache layer, from the outside."""

import pytest
import torch

from kvpolicy.errors import CacheError
from kvpolicy.plan.forward_observers import ATTENTION
from kvpolicy.plan.plan import POSITIONS
from tests.support.driving import HEADS, drive, feed, new_layer, random_entries, worth_plan
from tests.support.storage import bytes_per_slot, padded


def lengths(layer):
    return [length for row in layer.storage.slots.lengths for length in row]


def test_lengths_are_logical():
    layer = new_layer(worth_plan(budget=6))
    drive(layer, 20, 1, 1)
    assert layer.get_seq_length() == 22
    assert layer.get_mask_sizes(5) == (27, 0)
    assert layer.get_max_length() == -1
    assert lengths(layer) == [8, 8]


def test_the_keys_that_it_returns_lead_back_to_it():
    layer = new_layer(worth_plan())
    keys, values, _ = random_entries(torch.Generator(), 1, 3)
    returned, returned_values = layer.update(keys, values)
    assert returned.kvpolicy_layer is layer
    assert torch.equal(returned, keys)
    assert torch.equal(returned_values, values)
    assert not hasattr(keys, "kvpolicy_layer")


def test_only_decode_steps_take_entries_out_of_order():
    layer = new_layer(worth_plan(budget=6, every=3, any_order=True))
    drive(layer, 9, 5, 3, rows=2)
    assert layer.in_order
    for seed in range(8):
        drive(layer, 1, 1, 1, rows=2, seed=seed)
    assert not layer.in_order
    positions = padded(layer.storage, POSITIONS)
    assert not torch.equal(positions, positions.sort(-1).values)


def test_all_entries_are_returned_until_something_is_evicted_then_the_new_ones():
    layer = new_layer(worth_plan(budget=6, every=3))
    drive(layer, 4)
    keys, values, _ = random_entries(torch.Generator(), 1, 1)
    assert layer.update(keys, values)[0].shape[2] == 5
    layer = new_layer(worth_plan(budget=6, every=3))
    drive(layer, 9)
    assert layer.update(keys, values)[0].shape[2] == 1


@pytest.mark.parametrize("every", [1, 3])
def test_decoding_compresses_when_every_tokens_have_come_on_top(every):
    layer = new_layer(worth_plan(budget=6, every=every))
    drive(layer, 6)
    found = []
    for _ in range(2 * every):
        drive(layer, 1)
        found.append(lengths(layer)[0])
    assert found == [*range(7, 6 + every), 6] * 2


def test_a_policy_that_spares_prompts_compresses_at_the_first_decoded_token():
    layer = new_layer(worth_plan(budget=6, prefill=False))
    drive(layer, 20)
    assert lengths(layer) == [20, 20]
    drive(layer, 1)
    assert lengths(layer) == [6, 6]


def test_a_second_forward_before_the_first_has_ended_is_refused():
    layer = new_layer(worth_plan())
    keys, values, _ = random_entries(torch.Generator(), 1, 3)
    layer.update(keys, values)
    with pytest.raises(CacheError, match="did not reach kvpolicy"):
        layer.update(keys, values)


def test_recorded_tokens_evict_what_they_would_evict_one_by_one_and_can_be_undone():
    layer = new_layer(worth_plan(budget=6, every=3))
    layer.activate_past_recording()
    drive(layer, 20)
    assert lengths(layer) == [20, 20]  # a prompt, which crop may still shorten
    drive(layer, 4, 4)
    assert lengths(layer) == [8, 8]
    layer.crop(-3)
    assert layer.seq_len == 25
    assert lengths(layer) == [8, 8]
    drive(layer, 4)
    assert lengths(layer) == [9, 9]  # the newest waits: it may be undone as well
    layer.crop(0)
    assert lengths(layer) == [6, 6]
    drive(layer, 2)
    layer.crop(-2)
    assert lengths(layer) == [6, 6]
    with pytest.raises(CacheError, match="cannot undo 1 tokens"):
        layer.crop(-1)


def test_crop_takes_a_length_too():
    layer = new_layer(worth_plan(budget=30))
    drive(layer, 20)
    layer.crop(15)
    assert layer.seq_len == 15
    layer.crop(99)
    assert layer.seq_len == 15


def test_what_was_evicted_cannot_be_undone():
    layer = new_layer(worth_plan(budget=6, every=3))
    drive(layer, 20, 1)
    with pytest.raises(CacheError, match=r"layer 0: cannot undo 2 tokens, entries were evicted or packed 1 tokens ago"):
        layer.crop(-2)
    assert layer.seq_len == 21
    layer.crop(-1)
    assert lengths(layer) == [6, 6]


def test_rejected_candidates_leave_no_query_and_no_attention():
    one, other = (new_layer(worth_plan(budget=30)) for _ in range(2))
    entries = random_entries(torch.Generator().manual_seed(5), 1, 7)
    for layer in (one, other):
        layer.activate_past_recording()
        drive(layer, 9)
        layer.crop(0)
    feed(one, *entries)
    one.crop(-5)
    feed(other, *(tensor[:, :, :2] for tensor in entries))
    other.crop(0)
    for name in (POSITIONS, ATTENTION):
        assert torch.allclose(padded(one.storage, name).float(), padded(other.storage, name).float())
    for found, expected in zip(one.window.last([0]), other.window.last([0]), strict=True):
        assert torch.equal(found, expected)


def test_pads_are_dropped_with_the_first_eviction():
    layer = new_layer(worth_plan(budget=6))
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[0, :7] = False
    feed(layer, *random_entries(torch.Generator(), 2, 10), valid)
    assert layer.storage.slots.lengths == ((3, 3), (6, 6))
    assert layer.num_tokens == [3, 10]
    assert layer.storage.slots.segment(POSITIONS, 0, 0).tolist() == [0, 1, 2]


def test_pads_stay_while_nothing_is_evicted():
    layer = new_layer(worth_plan(budget=20))
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[0, :7] = False
    feed(layer, *random_entries(torch.Generator(), 2, 10), valid)
    assert layer.storage.slots.lengths == ((10, 10), (10, 10))
    assert layer.storage.slots.segment(POSITIONS, 0, 0).tolist() == [-1] * 7 + [0, 1, 2]
    assert layer.padded


def test_it_says_beforehand_whether_it_would_compress():
    layer = new_layer(worth_plan(budget=6, every=3))
    keys, values, _ = random_entries(torch.Generator(), 1, 7)
    layer.update(keys[:, :, :6], values[:, :, :6])
    assert not layer.would_compress()
    layer = new_layer(worth_plan(budget=6, every=3))
    layer.update(keys, values)
    assert layer.would_compress()


def test_bytes_are_counted_whenever_storage_has_changed():
    """Not only when somebody asks for a report: the most that there have been is known afterwards, too."""
    layer, generator, most = new_layer(worth_plan(budget=300, every=3, queries=200)), torch.Generator(), 0

    def agree():
        stats = layer.stats
        assert (stats.entry_bytes, stats.window_bytes) == (layer.storage.nbytes, layer.window.nbytes)
        assert (stats.seq_len, stats.held) == (layer.seq_len, layer.storage.average)
        assert stats.rows == len(layer.num_tokens)
        assert stats.peak_bytes >= stats.nbytes
        assert stats.peak_entry_bytes == most

    for count in (20, *[1] * 60, 30, *[1] * 30):
        feed(layer, *random_entries(generator, 1, count))
        most = max(most, layer.storage.nbytes)
        agree()
    layer.batch_repeat_interleave(3)
    feed(layer, *random_entries(generator, 3, 1))
    most = max(most, layer.storage.nbytes)
    agree()


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
def test_statistics_follow(ragged):
    layer = new_layer(worth_plan(budget=6, every=3, ragged=ragged))
    drive(layer, 20, 1, 1, 1)
    assert (layer.stats.seq_len, layer.stats.held, layer.stats.compressions) == (23, 6.0, 2)
    assert layer.stats.entry_bytes == layer.storage.nbytes == 9 * HEADS * bytes_per_slot(layer.plan)
    assert layer.stats.peak_entry_bytes >= 20 * layer.stats.entry_bytes // 9
    assert layer.stats.seconds > 0


def test_nothing_is_moved_before_the_first_token():
    layer = new_layer(worth_plan())
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    layer.crop(0)
    layer.reset()
    assert layer.get_seq_length() == 0


def test_pads_that_were_dropped_between_entries_cannot_be_undone():
    layer = new_layer(worth_plan(budget=6))
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[0, :7] = False
    feed(layer, *random_entries(torch.Generator(), 2, 10), valid)
    later = torch.tensor([[True, True], [False, False]])
    feed(layer, *random_entries(torch.Generator(), 2, 2), later)  # evicts nothing, and closes the gap in the second row
    assert layer.storage.slots.lengths == ((5, 5), (6, 6))
    with pytest.raises(CacheError, match="undo"):
        layer.crop(-2)


def test_undone_tokens_no_longer_vote():
    layer = new_layer(worth_plan(budget=30, queries=3))
    drive(layer, 9)
    layer.crop(-2)
    _, positions = layer.window.last([0])
    assert positions.max() == 6
    drive(layer, 4)
    assert layer.window.last([0])[1].tolist() == [[8, 9, 10]]
