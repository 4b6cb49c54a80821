"""Policies that must be calibrated: each once, on text that no case is made from."""

from collections.abc import Callable
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.plan.calibration import Calibration
from kvpolicy.policy import Policy
from kvpolicy.spec.dump import calibrated_digest


class Calibrations:
    """What plugins of several policies measured on one model; made when first asked for."""

    def __init__(self, model: PreTrainedModel, tokens: Callable[[], Tensor]) -> None:
        """`tokens` gives token ids [S, T] without pads."""
        self.model = model
        self._make_tokens = tokens
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
            self._made[plugins] = policy.calibrate(self.model, self.tokens)
        return self._made[plugins]
