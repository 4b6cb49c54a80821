"""What the mask of a forward tells about its tokens."""

import pytest
import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from kvpolicy.errors import CacheError
from kvpolicy.integrations.transformers.calls.padding_mask import NewTokens, is_foreign, new_tokens_of, policy_mask

PADDING = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def mask_of(padding, queries=5, **more):
    length = 5 if padding is None else padding.shape[1]
    call = {
        "batch_size": 2,
        "q_length": queries,
        "kv_length": length,
        "q_offset": length - queries,
        "kv_offset": 0,
        "attention_mask": None if padding is None else padding.bool(),
        "mask_function": causal_mask_function,
        "allow_is_causal_skip": True,
        **more,
    }
    return policy_mask(**call), sdpa_mask(**call)


def test_the_mask_is_the_stock_one():
    for padding in (None, PADDING):
        for queries in (1, 2, 5):
            found, stock = mask_of(padding, queries)
            assert found is stock is None or torch.equal(found, stock)


def test_no_mask_says_that_all_tokens_are_real():
    found, _ = mask_of(torch.ones(2, 5, dtype=torch.long))
    assert found is None
    assert new_tokens_of(found) is None
    assert not is_foreign(found)


def test_a_mask_of_pads_says_which_tokens_are_real():
    found, _ = mask_of(PADDING)
    assert new_tokens_of(found).valid.tolist() == PADDING.bool().tolist()
    assert new_tokens_of(found).counts == [3, 5]
    assert new_tokens_of(found).earlier == [0, 0]
    assert new_tokens_of(found).padded


def test_of_a_later_forward_only_its_own_tokens_count():
    found, _ = mask_of(PADDING, queries=2)
    assert new_tokens_of(found).counts == [2, 2]
    assert new_tokens_of(found).earlier == [1, 3]
    assert not new_tokens_of(found).padded


def test_a_causal_mask_without_pads_tags_no_new_tokens():
    found, _ = mask_of(None, queries=2)
    assert found is not None
    assert new_tokens_of(found) is None
    assert not is_foreign(found)


def test_other_masks_are_foreign():
    found, _ = mask_of(PADDING, mask_function=sliding_window_causal_mask_function(3))
    assert is_foreign(found)
    assert is_foreign(torch.ones(1, 1, 5, 5, dtype=torch.bool))
    assert new_tokens_of(found) is None


def test_no_row_is_padded_in_an_empty_batch():
    empty = torch.ones(0, 3, dtype=torch.bool)
    assert not NewTokens(empty, empty[:, :0]).padded


def test_a_mask_shorter_than_the_keys_hides_the_rest_as_in_stock():
    for queries in (1, 3):
        found, stock = mask_of(PADDING[:, :3], queries, kv_length=5, q_offset=5 - queries)
        assert torch.equal(found, stock)
        new_tokens = new_tokens_of(found)
        shown = torch.nn.functional.pad(PADDING[:, :3], (0, 2)).bool()
        assert new_tokens.valid.tolist() == shown[:, -queries:].tolist()
        assert new_tokens.earlier == shown[:, :-queries].sum(1).tolist()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_mask_of_other_rows_is_refused_unless_it_hides_nothing(rows):
    with pytest.raises(CacheError, match=f"mask is of {rows} rows, the forward of 2"):
        mask_of(PADDING[:1].expand(rows, 5))
    found = policy_mask(
        batch_size=2, q_length=2, kv_length=5, q_offset=3, attention_mask=torch.ones(rows, 5, dtype=torch.bool)
    )
    assert torch.equal(found, policy_mask(batch_size=2, q_length=2, kv_length=5, q_offset=3))
    assert new_tokens_of(found) is None
