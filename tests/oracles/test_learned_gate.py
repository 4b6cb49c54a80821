"""A linear gate on keys, with weights that were trained elsewhere (DMS, arXiv:2506.05345), and a threshold or a budget.

The weights are a tiny example: random, and put in the place of those that a calibration measured.
"""

import attrs
import numpy as np
import pytest
import torch

from kvpolicy.plan.calibration import Calibration
from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.simulation import Head, Method
from tests.oracles.test_calibrated import complex_of
from tests.oracles.test_threshold import Small
from tests.support.models import build, prompt

ALLOCATIONS = {
    "budget": {"layers": "uniform", "heads": "uniform"},
    "threshold": {"layers": "uniform", "heads": {"use": "threshold", "value": -0.1}},
}


class Gated(Method):
    """The product of a vector of the head with the key, and a number."""

    def __init__(self, *given, calibration, frequencies):
        super().__init__(*given)
        self.gates = [
            (layer["score[0].weight"].double().numpy(), layer["score[0].bias"].double().numpy())
            for layer in calibration.layers
        ]
        self.frequencies = frequencies

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        found = []
        for head in heads:
            weight, bias = self.gates[head.layer]
            own = [self.key(head.entries[slot]) @ weight[head.number] for slot in self.candidates(head)]
            found.append(np.array(own) + bias[head.number])
        return found

    def key(self, entry):
        if self.frequencies is None:
            return entry.key
        turned = complex_of(entry.key) * np.exp(-1j * entry.position * self.frequencies)
        return np.concatenate([turned.real, turned.imag])


class Limited(Gated, Small):
    """Logits of at least -0.1, of the best that fit the budget."""

    limit = 0.1


def trained(policy) -> Calibration:
    """Weights in the place of measured ones, written to a file and read again."""
    generator = torch.Generator().manual_seed(3)
    measured = policy.calibrate(build(), torch.cat([prompt(20, seed=row)[0] for row in range(2)]))
    layers = tuple(
        {name: torch.randn(tensor.shape, generator=generator) for name, tensor in layer.items()}
        for layer in measured.layers
    )
    return attrs.evolve(measured, layers=layers)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("keys", ["rotated", "unrotated"])
def test_what_a_gate_lets_through_stays(keys, allocation, tmp_path):
    given = 9, 2, 1, 3
    score = [{"use": "learned_gate", "keys": keys}]
    policy = shipped("adakv", *given, score=score, allocate=ALLOCATIONS[allocation])
    trained(policy).save(tmp_path / "gates.safetensors")
    calibration = Calibration.read(tmp_path / "gates.safetensors")
    frequencies = build().model.rotary_emb.inv_freq.double().numpy() if keys == "unrotated" else None

    def method(*numbers):
        kind = Limited if allocation == "threshold" else Gated
        return kind(*numbers, calibration=calibration, frequencies=frequencies)

    assert_holds_what_the_oracle_holds(policy, method, *given, calibration=calibration)
