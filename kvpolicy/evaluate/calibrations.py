"""Stores that must be calibrated: each once, on training text that no evaluation uses."""

from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.evaluate.testbed import EVALUATED
from kvpolicy.evaluate.testbed.training_text import training_text
from kvpolicy.plan.calibration import Calibration
from kvpolicy.plan.plan import Plan
from kvpolicy.policy import Policy
from kvpolicy.spec.dump import plugin_digest

SEED = 2**40  # evaluations have smaller ones


class Calibrations:
    """What the stores of several policies measured on one model; made when first asked for."""

    def __init__(self, model: PreTrainedModel, sequences: int = 16, length: int = 1024) -> None:
        self.model = model
        self._size = (sequences, length)
        self._found: dict[str, Calibration] = {}

    @cached_property
    def tokens(self) -> Tensor:
        """Token ids [sequences, length] that follow the testbed's training mixture, all tasks in turn."""
        sequences, length = self._size
        mixture = tuple(EVALUATED[row % len(EVALUATED)] for row in range(sequences))
        return training_text(SEED, mixture, length)

    def of(self, policy: Policy | None) -> Calibration | None:
        """The calibration of a policy's store, None when it needs none. Raises CalibrationError."""
        if policy is None or not policy.spec.store.calibrated:
            return None
        store = plugin_digest(policy.spec.store)
        if store not in self._found:
            self._found[store] = policy.calibrate(self.model, self.tokens)
        return self._found[store]

    def plan(self, policy: Policy) -> Plan:
        """The policy compiled for the model."""
        return policy.compile(self.model, calibration=self.of(policy))
