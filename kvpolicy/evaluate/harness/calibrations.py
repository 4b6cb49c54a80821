"""Stores that must be calibrated: each once, on text that no case is made from."""

from collections.abc import Callable
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.plan.calibration import Calibration
from kvpolicy.policy import Policy
from kvpolicy.spec.dump import plugin_digest


class Calibrations:
    """What the stores of several policies measured on one model; made when first asked for."""

    def __init__(self, model: PreTrainedModel, tokens: Callable[[], Tensor]) -> None:
        """`tokens` gives token ids [S, T] without pads."""
        self.model = model
        self._make_tokens = tokens
        self._made: dict[str, Calibration] = {}

    @cached_property
    def tokens(self) -> Tensor:
        """Token ids [S, T] that stores are calibrated on."""
        return self._make_tokens()

    def of(self, policy: Policy) -> Calibration | None:
        """The calibration of a policy's store, None when it needs none. Raises CalibrationError."""
        if not policy.spec.store.calibrated:
            return None
        store = plugin_digest(policy.spec.store)
        if store not in self._made:
            self._made[store] = policy.calibrate(self.model, self.tokens)
        return self._made[store]
