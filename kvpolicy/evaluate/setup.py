"""What a comparison runs: which policies, at which share of the full cache, on which items."""

from fractions import Fraction

import attrs

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.answers import QUESTION_MODES, SEEN
from kvpolicy.evaluate.testbed import EVALUATED
from kvpolicy.evaluate.testbed.tasks.item import SHORTEST
from kvpolicy.evaluate.testbed.vocabulary import MAXIMUM_LENGTH
from kvpolicy.policy import Policy

FULL = "full cache"


@attrs.frozen
class Contender:
    """One line of a comparison: a policy with its share of the full cache's bytes, or the full cache itself."""

    policy: Policy | None = None
    share: Fraction = Fraction(1)

    @property
    def name(self) -> str:
        """The policy's name, without its budget."""
        return FULL if self.policy is None else self.policy.name

    @property
    def label(self) -> str:
        """`"rkv 10%"`."""
        return FULL if self.policy is None else f"{self.name} {percent(self.share)}"


@attrs.frozen
class Setup:
    """Everything that decides the numbers, apart from the machine."""

    policies: tuple[Policy, ...]
    shares: tuple[Fraction, ...] = (Fraction(1, 4), Fraction(1, 10))
    tasks: tuple[str, ...] = EVALUATED
    items: int = 16  # a task
    length: int = 1024  # tokens an item
    rows: int = 16  # items at a time
    seed: int = 0
    question: str = SEEN  # whether scorers see it while they compress the context

    def __attrs_post_init__(self) -> None:
        if not SHORTEST <= self.length <= MAXIMUM_LENGTH:
            raise EvaluationError(f"length must be from {SHORTEST} to {MAXIMUM_LENGTH}: {self.length}")
        for name in ("items", "rows"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"{name} must be at least 1: {getattr(self, name)}")
        if self.question not in QUESTION_MODES:
            raise EvaluationError(f"question must be one of {', '.join(QUESTION_MODES)}: {self.question!r}")
        if self.seed < 0:
            raise EvaluationError(f"seed must be at least 0: {self.seed}")
        for share in self.shares:
            if not 0 < share < 1:
                raise EvaluationError(f"a share must be above 0% and below 100%: {percent(share)}")
        names = [policy.name for policy in self.policies]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise EvaluationError(f"policies must have different names: {', '.join(twice)}")

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """The full cache first, then every policy at every share."""
        return (Contender(), *(Contender(policy, share) for share in self.shares for policy in self.policies))


def percent(share: Fraction) -> str:
    """`"12.5%"`."""
    return f"{float(share * 100):.4g}%"
