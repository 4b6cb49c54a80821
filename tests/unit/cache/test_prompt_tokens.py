"""Which ids wait to be read, and which forwards end a prompt."""

import pytest
import torch

from kvpolicy.cache.request.pass_batch import PassBatch
from kvpolicy.cache.request.prompt_tokens import ForwardTokens, PromptTokens
from kvpolicy.cache.state_contents import Contents
from kvpolicy.errors import SavedCacheError
from kvpolicy.stages import Pass


def forward(held, ids, seen, mask=None):
    """Whether a forward of ids [B, q] behind `seen` columns ends a prompt."""
    ids = torch.tensor(ids)
    held.begin(ForwardTokens(len(ids), ids.shape[1], ids, None if mask is None else torch.tensor(mask)), seen)
    return held.commit(seen + ids.shape[1])


def unread(held, rows=2):
    return [ids.tolist() for ids in held.unread(range(rows))]


def test_pads_are_no_tokens_whichever_side_they_stand_on():
    held = PromptTokens()
    assert forward(held, [[1, 2, 3], [0, 4, 5]], 0, [[1, 1, 1], [0, 1, 1]])
    assert not forward(held, [[6], [7]], 3, [[1, 1, 1, 1], [0, 1, 1, 1]])
    assert forward(held, [[8, 9], [9, 0]], 4, [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])
    assert unread(held) == [[1, 2, 3, 6, 8, 9], [4, 5, 7, 9]]


def test_a_short_mask_hides_the_rest():
    held = PromptTokens()
    forward(held, [[1, 2, 3]], 0, [[1, 1]])
    assert unread(held, 1) == [[1, 2]]


def test_what_has_been_read_is_forgotten_row_by_row():
    held = PromptTokens()
    forward(held, [[1, 2], [3, 4]], 0)
    held.forget([1])
    assert unread(held) == [[1, 2], []]
    forward(held, [[5], [6]], 2)
    assert unread(held) == [[1, 2, 5], [6]]
    held.forget([0, 1])
    assert unread(held) == [[], []]
    assert not held.tensors


def test_an_announced_prompt_ends_where_it_was_said_to():
    held = PromptTokens()
    held.expect(4)
    assert [forward(held, [[token]], token) for token in range(4)] == [False, False, False, True]
    assert not forward(held, [[4]], 4)
    assert not held.is_prompt
    assert forward(held, [[5, 6]], 5)


def test_one_token_that_is_all_of_a_prompt_is_a_decode_step():
    held = PromptTokens()
    held.expect(9)
    assert not forward(held, [[3]], 8)
    assert not held.is_prompt


def test_an_end_that_has_passed_is_none():
    held = PromptTokens()
    held.expect(4)
    assert forward(held, [[1, 2]], 4)
    assert held.end is None


def test_undone_tokens_are_not_read():
    held = PromptTokens()
    forward(held, [[1, 2, 3], [0, 4, 5]], 0, [[1, 1, 1], [0, 1, 1]])
    held.crop(1, 2)
    assert unread(held) == [[1], []]
    held.crop(0, 5)
    assert unread(held) == [[], []]


def test_given_ids_stand_for_the_columns_that_they_cover():
    held = PromptTokens(torch.tensor([[1, 2, 3, 4]]))
    tokens = ForwardTokens(2, 3, unknown="inputs_embeds")
    assert held.begin(tokens, 0).ids.tolist() == [[1, 2, 3]] * 2
    held.commit(3)
    assert held.begin(tokens, 3).ids is None
    held.crop(0, 3)
    assert held.begin(tokens, 0).ids is None
    held.clear()
    assert held.begin(tokens, 0).ids.tolist() == [[1, 2, 3]] * 2


def test_tokens_that_are_not_known_are_the_newest_from_then_on():
    held = PromptTokens()
    forward(held, [[1, 2]], 0)
    held.begin(ForwardTokens(1, 1, unknown="inputs_embeds"), 2)
    held.commit(3)
    assert unread(held, 1) == [[]]


def test_many_steps_are_held_as_one():
    held = PromptTokens()
    for step in range(200):
        forward(held, [[step]], step)
    assert unread(held, 1) == [list(range(200))]
    assert len(held.tensors) <= 65


def contents(**tensors):
    numbers = {"end": 7, "begun": True}
    return Contents(tensors, numbers, torch.device("cpu"), SavedCacheError)


def test_it_is_written_and_read_back():
    held, other = PromptTokens(), PromptTokens()
    held.expect(7)
    forward(held, [[1, 2], [3, 4]], 0)
    described = dict(held.describe())
    other.restore(contents(ids=described["ids"]), 2)
    assert dict(other.describe())["end"] == described["end"] == 7
    assert unread(other) == unread(held)
    for wrong in (torch.full((2, 2), -2), torch.ones(3, 2, dtype=torch.int64), torch.ones(2, 2)):
        with pytest.raises(SavedCacheError, match="ids"):
            PromptTokens().restore(contents(ids=wrong), 2)


def test_passes_of_different_length_are_padded_behind():
    passes = {0: Pass(torch.tensor([7, 8])), 2: Pass(torch.tensor([9]), ((1, 3), (4, 5)))}
    batch = PassBatch.of(passes, [5, 6, 9], torch.device("cpu"))
    assert batch.tokens.tolist() == [[7, 8], [0, 0], [9, 0]]
    assert batch.positions.tolist() == [[5, 6], [-1, -1], [9, -1]]
    assert batch.real.tolist() == [[True, True], [False, False], [True, False]]
    assert batch.reads.tolist() == [True, False, True]
    slots = batch.slots(torch.arange(6).expand(3, 1, 6))
    assert slots[:, 0].tolist() == [[0, 1, 2, 3, 4, 5], [-1] * 6, [1, 2, 4, -1, -1, -1]]
    alike = {row: Pass(torch.tensor([7])) for row in range(3)}
    assert PassBatch.of(alike, [5, 6, 9], torch.device("cpu")).slots(slots) is None
