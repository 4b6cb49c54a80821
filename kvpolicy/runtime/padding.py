"""Which of the tokens of a forward are real: read from the 2-D mask that transformers hands to our mask function."""

from functools import cached_property
from typing import Any

import attrs
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

_TAG = "kvpolicy_arrival"


@attrs.frozen(eq=False)
class Arrival:
    """The tokens of one forward, shared by all layers: what is counted is read from the device once."""

    valid: Tensor  # [B, q] bool

    @cached_property
    def counts(self) -> list[int]:
        """Real tokens per row."""
        return [int(count) for count in self.valid.sum(1).tolist()]

    @property
    def padded(self) -> bool:
        """Whether there is a pad among them."""
        return min(self.counts, default=0) < self.valid.shape[1]


def policy_mask(**call: Any) -> Tensor | None:
    """The mask function registered beside our attention: the stock mask, and with it which new tokens are real.

    A mask that is more than causal and padding (packed sequences, image blocks) is not tagged: what it hides is known
    for slots in order only, so it can not be carried across an eviction.
    """
    mask = sdpa_mask(**call)
    padding = call.get("attention_mask")
    if mask is not None and call.get("mask_function", causal_mask_function) is causal_mask_function:
        end = call["kv_length"] + call.get("kv_offset", 0)
        arrived = None if padding is None else Arrival(padding[:, end - call["q_length"] : end].bool())
        setattr(mask, _TAG, (arrived,))
    return mask


def arrival_of(mask: Tensor | None) -> Arrival | None:
    """What a mask says about the new tokens; None when none of them is a pad."""
    (arrival,) = getattr(mask, _TAG, (None,))
    return arrival


def is_foreign(mask: Tensor | None) -> bool:
    """Whether a mask hides more than later tokens and pads."""
    return mask is not None and not hasattr(mask, _TAG)
