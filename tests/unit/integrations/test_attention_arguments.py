"""Which arguments of an attention call a compressed cache cannot honour."""

import pytest
import torch

from kvpolicy.integrations.transformers.calls.attention_arguments import changing

HEADS, QUERIES, KEYS = 4, 5, 12

CHANGING = {
    "softcap": 20.0,
    "s_aux": torch.zeros(4),
    "position_bias": torch.zeros(1, 4, 5, 12),
    "alibi": torch.zeros(4, 1, 12),
    "is_causal": False,
    "sliding_window": 8,
    "cu_seq_lens_q": torch.tensor([0, 5]),
    "indices": torch.zeros(1, 5, 3, dtype=torch.long),
    "output_attentions": True,
    "a bias of an unknown name": torch.zeros(1, 4, 5, 12),
    "one for all queries": torch.zeros(1, 1, 1, 12),
    "a mask of an unknown name": torch.ones(2, 12, dtype=torch.bool),
    "one number a head": torch.zeros(1, 4, 1, 1),
}
WITHOUT_EFFECT = {
    "softcap": None,
    "is_causal": True,
    "sliding_window": None,
    "output_attentions": False,
    "tokenizer": object(),
    "logits_to_keep": 1,
    "token_type_ids": torch.zeros(2, 12, dtype=torch.long),
    "shift_labels": torch.zeros(2, 5, dtype=torch.long),
    "num_items_in_batch": torch.tensor(7.0),
    "output_router_logits": True,
    "position_ids": torch.zeros(1, 5, dtype=torch.long),
    "use_cache": True,
    "unheard_of": 1,
    "a number": 0.5,
    "a word": "words",
    "states": torch.zeros(2, 5, 32),
    "an image": torch.zeros(2, 3, 16, 16),
}


@pytest.mark.parametrize(("name", "value"), CHANGING.items(), ids=CHANGING)
def test_what_changes_attention_is_named(name, value):
    assert list(changing({"use_cache": True, name: value}, HEADS, QUERIES, KEYS)) == [name]


@pytest.mark.parametrize(("name", "value"), WITHOUT_EFFECT.items(), ids=WITHOUT_EFFECT)
def test_what_does_not_is_left_alone(name, value):
    assert not list(changing({name: value}, HEADS, QUERIES, KEYS))


def test_where_the_keys_are_not_known_only_names_and_heads_count():
    call = {"unknown": torch.zeros(1, 4, 5, 12), "sinks": torch.zeros(4), "other": torch.zeros(4)}
    assert list(changing(call, HEADS, QUERIES)) == ["sinks", "other"]
