"""Configuration and results of the generation benchmark."""

from typing import Any

import attrs
import torch

from kvpolicy.bench.baselines.contenders import DYNAMIC, PREALLOCATED
from kvpolicy.bench.protocol.model_shapes import ModelShape
from kvpolicy.errors import InputError
from kvpolicy.policy import Policy

ROOM = 64  # tokens at the end that are left for the steps that are timed


@attrs.frozen
class GenerateSetup:
    """Prompt and new tokens of a row, and the bytes that a batch may take."""

    policies: tuple[Policy, ...]
    shape: ModelShape
    prompt: int
    new: int
    memory: int  # bytes; on a GPU of all that is allocated, on a CPU of what caches hold
    device: torch.device
    dtype: torch.dtype
    full: tuple[str, ...] = (DYNAMIC, PREALLOCATED)
    graph: bool = False
    points: int = 0  # lengths at which steps of full caches are timed; 0: every token is generated
    rounds: int = 3
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        if self.prompt < 1 or self.new < 2 or self.memory < 1 or self.points < 0 or self.rounds < 1:
            raise InputError("generate needs a prompt, at least 2 new tokens, memory and rounds")
        if self.points and (self.new <= ROOM or self.rounds > ROOM // 2):
            raise InputError(f"steps at some lengths need more than {ROOM} new tokens and at most {ROOM // 2} rounds")
        if not self.policies:
            raise InputError("generate needs at least one policy")

    @property
    def length(self) -> int:
        """Tokens of a row when it is complete."""
        return self.prompt + self.new


@attrs.frozen
class LargestBatch:
    """The most rows that fit, and the bytes that they take in their last steps."""

    rows: int = 0
    peak_bytes: int = 0
    searched: bool = True  # False: time ran out, and more rows may fit


@attrs.frozen
class Throughput:
    """One contender at its largest batch. `seconds` are per token of a row, divided by the rows: one sample a round."""

    batch: LargestBatch
    seconds: tuple[float, ...]
    facts: dict[str, Any]
