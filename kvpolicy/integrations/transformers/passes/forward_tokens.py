"""The tokens of a forward, found among its arguments."""

from typing import Any

import torch
from torch import Tensor

from kvpolicy.cache.request.prompt_tokens import ForwardTokens

# Arguments that say nothing beside the tokens: what they are, where they stand, which of them are pads.
_OF_TOKENS = frozenset({"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "labels"})


def forward_tokens(arguments: dict[str, Any]) -> ForwardTokens | None:
    """What a forward with these arguments brings; None when it brings no tokens of a shape that is known."""
    ids, embedded = (arguments.get(name) for name in ("input_ids", "inputs_embeds"))
    brought = ids if isinstance(ids, Tensor) else embedded
    if not isinstance(brought, Tensor) or brought.ndim < 2:
        return None
    mask, places = (arguments.get(name) for name in ("attention_mask", "position_ids"))
    other = next((name for name, value in arguments.items() if _is_other_input(name, value)), "")
    unknown = "inputs_embeds" if not isinstance(ids, Tensor) else other
    return ForwardTokens(
        rows=brought.shape[0],
        count=brought.shape[1],
        ids=None if unknown else ids,
        mask=mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
        places=places if isinstance(places, Tensor) else None,
        unknown=unknown,
        strange_mask=mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2),
    )


def _is_other_input(name: str, value: object) -> bool:
    """Whether an argument is something that the model reads in the place of tokens, such as an image."""
    return name not in _OF_TOKENS and isinstance(value, Tensor) and value.is_floating_point()


def places_behind(tokens: ForwardTokens, real: Tensor | None, num_tokens: list[int], count: int) -> Tensor | None:
    """Positions for the rotation of `count` tokens behind a forward, [..., B, m]; None where the model counts columns.

    A row goes on from the last position of its tokens that are no pads; one without any, from its number of tokens.
    """
    places = tokens.places
    if places is None:
        return None
    rows = len(num_tokens)
    places = places.expand(*places.shape[:-2], rows, places.shape[-1])
    if real is None:
        last = places.amax(-1)
    else:
        real = real.to(places.device).expand(places.shape)
        none = torch.tensor(num_tokens, device=places.device, dtype=places.dtype) - 1
        lowest = torch.iinfo(places.dtype).min
        last = places.masked_fill(~real, lowest).amax(-1)
        last = torch.where(real.any(-1), last, none)
    if last.ndim > 1:  # several axes, which text goes through alike
        last = last.amax(tuple(range(last.ndim - 1)), keepdim=True).expand_as(last)
    return last[..., None] + 1 + torch.arange(count, device=places.device, dtype=places.dtype)
