"""The two decode steps, without a compression and with one: functions of tensors that stay where they are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvpolicy.cache.device_faults import DeviceFaults
from kvpolicy.integrations.transformers.decode_graph.evict import evict
from kvpolicy.integrations.transformers.decode_graph.static_layer import StaticLayer

Forward = Callable[..., Any]


class StepInputs:
    """What the host writes before a step, and what steps count. L layers, B rows."""

    def __init__(self, layers: int, rows: int, faults: DeviceFaults) -> None:
        device = faults.counts.device
        self.tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.places = torch.zeros((rows, 1), dtype=torch.int64, device=device)  # for the rotary embedding
        self.mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)  # four dimensions: nobody makes another
        self.clock = torch.zeros(rows, dtype=torch.int32, device=device)  # real tokens before the step
        self.due = torch.zeros((layers, rows), dtype=torch.bool, device=device)
        self.budgets = torch.zeros((layers, rows), dtype=torch.int64, device=device)
        self.nan = faults.nan


class Step:
    """One token for every row. Called without arguments: it reads `inputs`, and changes `layers` in place."""

    def __init__(
        self, forward: Forward, layers: Sequence[StaticLayer], inputs: StepInputs, *, compresses: bool
    ) -> None:
        self.forward = forward
        self.layers = tuple(layers)
        self.cache = Cache(layers=list(layers))
        self.inputs = inputs
        self.compresses = compresses

    def __call__(self) -> Tensor:
        """Logits [B, 1, vocabulary]."""
        given = self.inputs
        outputs = self.forward(
            input_ids=given.tokens,
            attention_mask=given.mask,
            position_ids=given.places,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        if self.compresses:
            evict(self.layers, given.due, given.budgets, given.clock.long() + 1, given.nan)
        given.clock.add_(1)
        logits: Tensor = outputs.logits
        return logits
