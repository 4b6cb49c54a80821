"""What is recommended from: policies worth trying on any model, and the share of the cache that memory gives."""

from fractions import Fraction
from typing import Final

import attrs
from transformers import PretrainedConfig

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.models.text_encoding import positions_of
from kvpolicy.plan.plan import Plan

CANDIDATES: Final = (
    "kvpolicy:streaming_llm",
    "kvpolicy:snapkv",
    "kvpolicy:rkv",
    "kvpolicy:rkv_int4",
    "kvpolicy:blend3",
    "kvpolicy:kivi4",
    "kvpolicy:rotation4",
    "kvpolicy:rkv_centred",
    "kvpolicy:headkv_centred",
    "kvpolicy:headkv_centred5",
)


@attrs.frozen
class Memory:
    """Bytes of all sequences of a batch together, and what a full cache would take."""

    size: int
    context: int
    batch: int
    full_bytes: int  # of the layers that a policy manages
    other_bytes: int  # of the layers with a sliding window, which stay as they are

    @property
    def is_enough(self) -> bool:
        """Whether a full cache fits."""
        return self.full_bytes + self.other_bytes <= self.size

    @property
    def share(self) -> Fraction:
        """What there is room for of the full cache in the managed layers."""
        return Fraction(self.size - self.other_bytes, self.full_bytes)


def memory_of(plan: Plan, config: PretrainedConfig, size: int, context: int, batch: int) -> Memory:
    """What `size` bytes give `batch` sequences of `context` tokens; `plan` is that of the full cache.

    Raises EvaluationError when the model has fewer positions, or when the layers that cannot be made smaller alone
    take more.
    """
    most = positions_of(config)
    if most is not None and context > most:
        raise EvaluationError(f"--context {context}: the model knows {most} positions")
    full = batch * plan.footprint.full_bytes(context)
    other = batch * plan.footprint.stock_bytes(context)
    if size <= other:
        raise EvaluationError(f"--memory: layers with a sliding window alone take {other} bytes: {size}")
    return Memory(size, context, batch, full, other)
