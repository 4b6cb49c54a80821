"""What all gates share."""

from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from kvpolicy.bench.baselines.contenders import DYNAMIC
from kvpolicy.bench.gates.scale import Scale
from kvpolicy.bench.protocol.case import Case
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.model_shapes import ModelShape, random_model
from kvpolicy.bench.report.verdict import Verdict
from kvpolicy.errors import InputError

CPU = torch.device("cpu")
Judged = tuple[list[Verdict], list[Case]]
Gate = Callable[[Scale, Clock], Judged]


def model_of(shape: ModelShape, length: int) -> LlamaForCausalLM:
    """A model with random weights for that many tokens, in float32."""
    return random_model(shape, length, CPU, torch.float32)


def must_be_measured(what: str, why: str) -> None:
    """A gate leaves nothing out."""
    raise InputError(f"{what}: {why}")


def as_multiple(
    case: Case, gate: str, what: str, aim: float, floor: float | None = None, *, of: str = DYNAMIC
) -> Verdict:
    """Our time as a multiple of that with a full cache of the model, which should be small."""
    claim = f"{what}: time as a multiple of {'the plain model' if of == DYNAMIC else of}'s"
    value, noise = 1 / case.ratio(of), case.noise
    return Verdict(gate, claim, value, aim, at_most=True, noise=noise, claimed=False, floor=floor)
