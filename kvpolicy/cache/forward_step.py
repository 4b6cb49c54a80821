"""What is the same in all layers of a cache while one forward goes through them: computed once, not in each layer."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from kvpolicy.cache.trigger import least_allowed
from kvpolicy.plan.plan import Plan


class ForwardStep:
    """The tokens of one forward, and what layers may hold behind them. Nobody changes it, so layers may share it."""

    def __init__(self, plan: Plan, before: list[int], seq_len: int, count: int, positions: Tensor) -> None:
        """`count` tokens, pads included, behind `before` of each row; `seq_len` are all of a row with them.

        `positions` are those of the new tokens, int32 [B, count].
        """
        self.plan, self.before, self.seq_len, self.count = plan, before, seq_len, count
        self.positions = positions
        self.by_head = positions[:, None].expand(-1, plan.geometry.kv_heads, -1)  # [B, K, count]
        self.after = [tokens + count for tokens in before]  # tokens of each row behind the forward
        self._allowed: dict[bool, Sequence[float]] = {}  # by whether the forward is a decode step
        self._with_pads: tuple[Tensor, ForwardStep] | None = None

    @classmethod
    def of(cls, plan: Plan, before: list[int], seq_len: int, count: int, device: torch.device) -> "ForwardStep":
        """One without pads, as far as is known."""
        places = torch.arange(count, device=device)
        positions = (torch.tensor(before, device=device)[:, None] + places).to(torch.int32)
        return cls(plan, before, seq_len, count, positions)

    def with_pads(self, valid: Tensor, counts: Sequence[int]) -> "ForwardStep":
        """The same forward, now that it is known which of its tokens are none: bool [B, count], `counts` in each row.

        Pads have position -1.
        """
        if self._with_pads is None or self._with_pads[0] is not valid:
            places = torch.tensor(self.before, device=valid.device)[:, None] + valid.cumsum(1) - 1
            positions = places.masked_fill(~valid, -1).to(torch.int32)
            step = ForwardStep(self.plan, self.before, self.seq_len, self.count, positions)
            step.after = [tokens + count for tokens, count in zip(self.before, counts, strict=True)]
            self._with_pads = valid, step
        return self._with_pads[1]

    @cached_property
    def limits(self) -> Sequence[int]:
        """Slots per KV head beyond which the storage of each layer does not grow."""
        return self.plan.capacities(self.seq_len)

    @cached_property
    def most_tokens(self) -> int:
        """Tokens of the row that has the most."""
        return max(self.after)

    def least_allowed(self, *, decoding: bool) -> Sequence[float]:
        """Entries per KV head up to which no row of a layer is compressed, for each layer."""
        allowed = self._allowed.get(decoding)
        if allowed is None:
            allowed = self._allowed[decoding] = least_allowed(self.plan, self.after, decoding=decoding)
        return allowed
