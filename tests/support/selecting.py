"""Asking a selector about scores alone."""

import torch
from torch import Tensor

from kvpolicy.stages import SelectionRequest, Selector


def selected_by(selector: Selector, scores: Tensor, candidates: Tensor, counts: Tensor, **rest) -> Tensor:
    """What it chooses of slots that are all filled, in order of position."""
    positions = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    return selector.select(SelectionRequest(scores, candidates, counts, **{"positions": positions, **rest}))
