"""Policies that must be calibrated: each once, on text that no case is made from."""

import contextlib
import copy
import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.errors import CalibrationError
from kvpolicy.integrations.transformers.saving.model_digest import model_digest
from kvpolicy.plan.calibration import Calibration
from kvpolicy.policy import Policy
from kvpolicy.spec.dump import calibrated_digest


class Calibrations:
    """What plugins of several policies measured on one model; made when first asked for."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Callable[[], Tensor],
        *,
        in_float32: bool = False,
        folder: Path | None = None,
    ) -> None:
        """`tokens` gives token ids [S, T] without pads.

        With `in_float32` a copy of the model in float32 computes them, where the model's own dtype is slow. `folder` is
        where other processes, and a run that goes on after this one, find what has been made.
        """
        self.model = model
        self._make_tokens = tokens
        self._in_float32 = in_float32
        self._folder = folder
        self._made: dict[str, Calibration] = {}

    @cached_property
    def tokens(self) -> Tensor:
        """Token ids [S, T] that plugins are calibrated on."""
        return self._make_tokens()

    def of(self, policy: Policy) -> Calibration | None:
        """The calibration of a policy, None when it needs none. Raises CalibrationError."""
        if not policy.spec.calibrated:
            return None
        plugins = calibrated_digest(policy.spec)
        if plugins not in self._made:
            self._made[plugins] = self._measured(policy) if self._folder is None else self._kept(policy, self._folder)
        return self._made[plugins]

    def _kept(self, policy: Policy, folder: Path) -> Calibration:
        """That of the folder; what is not there, or damaged, or of another model, is made and written there."""
        tokens = self.tokens.cpu().contiguous().numpy().tobytes()
        name = hashlib.sha256(tokens + f"{self._in_float32} {calibrated_digest(policy.spec)}".encode()).hexdigest()[:16]
        path = folder / f"{name}.safetensors"
        try:
            calibration = Calibration.read(path)
            calibration.require(policy.spec, model_digest(self.model))
        except CalibrationError:
            calibration = self._measured(policy)
            with contextlib.suppress(OSError, CalibrationError):  # unwritten it is made again, which takes time only
                folder.mkdir(parents=True, exist_ok=True)
                calibration.save(path)
        return calibration

    def _measured(self, policy: Policy) -> Calibration:
        if not self._in_float32 or self.model.dtype == torch.float32:
            return policy.calibrate(self.model, self.tokens)
        wider: Any = copy.deepcopy(self.model)
        made = policy.calibrate(wider.to(torch.float32), self.tokens)
        return attrs.evolve(made, model=model_digest(self.model))
