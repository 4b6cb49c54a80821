"""A policy compiled for one model geometry, device and dtype."""

import sys
from functools import cached_property

import attrs
import torch

from kvpolicy.errors import UnsupportedModelError
from kvpolicy.plan.budgets import Budgets
from kvpolicy.plan.pipeline import state_name
from kvpolicy.spec.policy import NEVER, PolicySpec
from kvpolicy.stages import Column, Geometry, Needs

POSITIONS = "positions"
ATTENTION = "attention"
LOG_VOTES = "log_votes"


@attrs.frozen(eq=False)
class Plan:
    """What the runtime executes; immutable, so that caches and threads may share it."""

    spec: PolicySpec
    geometry: Geometry
    device: torch.device
    dtype: torch.dtype
    needs: Needs
    columns: dict[str, Column]  # what one slot of one KV head holds
    entry_columns: tuple[str, ...]  # those that the codec reads and writes
    budgets: Budgets

    @cached_property
    def ragged(self) -> bool:
        """Whether the heads of a layer may hold different numbers of entries."""
        return self.spec.allocate.heads.ragged

    @property
    def compresses_while_decoding(self) -> bool:
        """False when the policy is written for prompts only (`every: never`)."""
        return self.spec.compress.every != NEVER

    def capacity(self, ordinal: int, seen: int) -> int:
        """Slots per KV head up to which the managed layer number `ordinal` may grow: its budget and the slack."""
        if not self.compresses_while_decoding:
            return sys.maxsize
        return self.budgets.ahead(seen)[ordinal] + self.budgets.slack


def compile_policy(spec: PolicySpec, geometry: Geometry, device: torch.device | str, dtype: torch.dtype) -> Plan:
    """Fit a policy to a model. Raises PolicyError or UnsupportedModelError when the two do not go together."""
    columns = _columns(spec, geometry, dtype)
    entry_bytes = sum(column.bytes_per_slot for column in columns.values())
    return Plan(
        spec=spec,
        geometry=geometry,
        device=_device(device),
        dtype=_floating(dtype),
        needs=_needs(spec),
        columns=columns,
        entry_columns=tuple(spec.store.columns(geometry, dtype)),
        budgets=Budgets(spec, geometry, entry_bytes),
    )


def _needs(spec: PolicySpec) -> Needs:
    needs = [weighted.scorer.needs() for weighted in spec.score]
    return Needs(max(one.queries for one in needs), any(one.attention for one in needs))


def _columns(spec: PolicySpec, geometry: Geometry, dtype: torch.dtype) -> dict[str, Column]:
    columns = dict(spec.store.columns(geometry, dtype))
    columns[POSITIONS] = Column((), torch.int32, -1)
    if spec.merge.votes:
        columns[LOG_VOTES] = Column((), torch.float32)
    if _needs(spec).attention:
        columns[ATTENTION] = Column((geometry.group,), torch.float32)
    for term, weighted in enumerate(spec.score):
        for state in weighted.scorer.slot_state():
            columns[state_name(term, state.name)] = Column((), torch.float32, state.fill)
    return columns


def _device(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnsupportedModelError(f"unknown device: {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedModelError(f"device must be cpu or cuda: {str(name)!r}")
    return device


def _floating(dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UnsupportedModelError(f"dtype must be float32, bfloat16, float16 or float64: {dtype}")
    return dtype
