"""Which tokens of a forward are pads, from the 2-D mask that transformers passes to the mask function."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvpolicy.errors import CacheError

_TAG = "kvpolicy_new_tokens"


@attrs.frozen(eq=False)
class NewTokens:
    """The tokens of one forward, shared by all layers, so that counts are read from the device once."""

    valid: Tensor  # [B, q] bool, False for pads
    earlier_valid: Tensor  # [B, seen] bool, the same for the tokens of earlier forwards

    @cached_property
    def _counts(self) -> list[list[int]]:
        counts: list[list[int]] = torch.stack([self.valid.sum(1), self.earlier_valid.sum(1)]).tolist()
        return counts

    @property
    def counts(self) -> list[int]:
        """Tokens per row, without pads."""
        return self._counts[0]

    @property
    def earlier(self) -> list[int]:
        """Tokens per row in earlier forwards, without pads, according to the mask of this one."""
        return self._counts[1]

    @property
    def padded(self) -> bool:
        """Whether there are pads among them."""
        return any(count < self.valid.shape[1] for count in self.counts)


def policy_mask(stock: Callable[..., Tensor | None] = sdpa_mask, **call: Any) -> Tensor | None:
    """The mask function of kvpolicy's attention: the mask of `stock`, tagged with the pads among the new tokens.

    `stock` makes the mask of the model's own attention, bool or float. A mask that is more than causal and padding
    (packed sequences, image blocks) is not tagged: it applies to slots in order only, so it is not valid after an
    eviction.

    Raises CacheError if the mask and the forward have different rows, before any layer has appended tokens.
    """
    padding = call.get("attention_mask")
    if padding is not None and padding.shape[0] != call["batch_size"]:
        if not padding.bool().all():
            raise CacheError(f"the mask is of {padding.shape[0]} rows, the forward of {call['batch_size']}")
        padding = call["attention_mask"] = None  # all tokens are visible
    mask = stock(**call)
    if mask is not None and call.get("mask_function", causal_mask_function) is causal_mask_function:
        end = call["kv_length"] + call.get("kv_offset", 0)
        new_tokens = None if padding is None else _new_tokens(padding.bool(), end - call["q_length"], end)
        setattr(mask, _TAG, (new_tokens,))
    return mask


def _new_tokens(padding: Tensor, start: int, end: int) -> NewTokens:
    # As in transformers, tokens beyond a short mask are hidden.
    padding = functional.pad(padding, (0, max(0, end - padding.shape[1])))
    return NewTokens(padding[:, start:end], padding[:, :start])


def new_tokens_of(mask: Tensor | None) -> NewTokens | None:
    """The new tokens of a tagged mask; None if there are no pads."""
    (new_tokens,) = getattr(mask, _TAG, (None,))
    return new_tokens


def is_foreign(mask: Tensor | None) -> bool:
    """Whether a mask hides more than later tokens and pads."""
    return mask is not None and not hasattr(mask, _TAG)
