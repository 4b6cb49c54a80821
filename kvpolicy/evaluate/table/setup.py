"""What an evaluation runs; everything that decides its numbers, apart from the machine."""

from fractions import Fraction

import attrs

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.calibrations import SEED as CALIBRATION
from kvpolicy.evaluate.setup import percent
from kvpolicy.evaluate.testbed import EVALUATED
from kvpolicy.evaluate.testbed.tasks.item import SHORTEST
from kvpolicy.evaluate.testbed.vocabulary import MAXIMUM_LENGTH
from kvpolicy.policy import Policy

BASES = ("snapkv", "rkv", "streaming_llm")


@attrs.frozen
class DecodeSetup:
    """How decode steps are timed: a model with random weights, whose caches are filled directly."""

    lengths: tuple[int, ...] = (1024, 4096, 16384)
    share: Fraction = Fraction(1, 8)  # of the tokens that are kept; for readers, of the entries that are read
    pairs: int = 15  # steps of the full cache and of the policy, in turns
    hidden: int = 512
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2

    def __attrs_post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 64:
            raise EvaluationError(f"lengths must be at least 64: {self.lengths}")


@attrs.frozen
class TableSetup:
    """The table: which policies, at which shares, on how many items."""

    policies: tuple[Policy, ...]
    bases: tuple[Policy, ...] = ()  # of the comparison of mergers
    mergers: tuple[str, ...] = ()
    shares: tuple[Fraction, ...] = (Fraction(1, 4), Fraction(1, 8), Fraction(1, 16))
    tasks: tuple[str, ...] = EVALUATED
    items: int = 48  # a task
    length: int = 1024  # tokens an item
    rows: int = 16  # items at a time
    error_items: int = 4  # a task, whose attention is compared with float64
    error_steps: int = 64  # the newest tokens of each, decoded one by one
    seed: int = 1
    calibration: tuple[int, int] = (16, 1024)  # sequences and tokens that stores are calibrated on
    decode: DecodeSetup = attrs.field(factory=DecodeSetup)

    def __attrs_post_init__(self) -> None:
        for name in ("items", "rows", "error_items", "error_steps"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"{name} must be at least 1: {getattr(self, name)}")
        if not SHORTEST <= self.length <= MAXIMUM_LENGTH:
            raise EvaluationError(f"length must be from {SHORTEST} to {MAXIMUM_LENGTH}: {self.length}")
        if not 0 <= self.seed < CALIBRATION:
            raise EvaluationError(f"seed must be from 0 to {CALIBRATION - 1}: {self.seed}")
        for share in self.shares:
            if not 0 < share < 1:
                raise EvaluationError(f"a share must be above 0% and below 100%: {percent(share)}")
        names = [policy.name for policy in self.policies]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise EvaluationError(f"policies must have different names: {', '.join(twice)}")
