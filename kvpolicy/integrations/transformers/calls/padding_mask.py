"""Which of the tokens of a forward are real: read from the 2-D mask that transformers hands to our mask function."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvpolicy.errors import CacheError

_TAG = "kvpolicy_arrival"


@attrs.frozen(eq=False)
class NewTokens:
    """The tokens of one forward, shared by all layers: what is counted is read from the device once."""

    valid: Tensor  # [B, q] bool
    before: Tensor  # [B, seen] bool, the same for the tokens of earlier forwards

    @cached_property
    def _counts(self) -> list[list[int]]:
        counts: list[list[int]] = torch.stack([self.valid.sum(1), self.before.sum(1)]).tolist()
        return counts

    @property
    def counts(self) -> list[int]:
        """Real tokens per row."""
        return self._counts[0]

    @property
    def earlier(self) -> list[int]:
        """Real tokens per row in earlier forwards, according to this one's mask."""
        return self._counts[1]

    @property
    def padded(self) -> bool:
        """Whether there is a pad among them."""
        return any(count < self.valid.shape[1] for count in self.counts)


def policy_mask(stock: Callable[..., Tensor | None] = sdpa_mask, **call: Any) -> Tensor | None:
    """The mask function registered beside our attention: the stock mask, and with it which new tokens are real.

    `stock` makes the mask that the model's own attention takes, bool or float. A mask that is more than causal and
    padding (packed sequences, image blocks) is not tagged: what it hides is known for slots in order only, so it can
    not be carried across an eviction.

    Raises CacheError when the mask is of other rows than the forward, before any layer has taken tokens.
    """
    padding = call.get("attention_mask")
    if padding is not None and padding.shape[0] != call["batch_size"]:
        if not padding.bool().all():
            raise CacheError(f"the mask is of {padding.shape[0]} rows, the forward of {call['batch_size']}")
        padding = call["attention_mask"] = None  # it hides nothing
    mask = stock(**call)
    if mask is not None and call.get("mask_function", causal_mask_function) is causal_mask_function:
        end = call["kv_length"] + call.get("kv_offset", 0)
        arrived = None if padding is None else _new_tokens(padding.bool(), end - call["q_length"], end)
        setattr(mask, _TAG, (arrived,))
    return mask


def _new_tokens(padding: Tensor, start: int, end: int) -> NewTokens:
    padding = functional.pad(padding, (0, max(0, end - padding.shape[1])))  # a short mask hides the rest, as in stock
    return NewTokens(padding[:, start:end], padding[:, :start])


def new_tokens_of(mask: Tensor | None) -> NewTokens | None:
    """What a mask says about the new tokens; None when none of them is a pad."""
    (new_tokens,) = getattr(mask, _TAG, (None,))
    return new_tokens


def is_foreign(mask: Tensor | None) -> bool:
    """Whether a mask hides more than later tokens and pads."""
    return mask is not None and not hasattr(mask, _TAG)
