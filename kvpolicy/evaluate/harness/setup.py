"""What an evaluation runs: everything that decides its numbers, apart from the machine."""

from fractions import Fraction

import attrs

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.fitting.fit import keeps_everything
from kvpolicy.evaluate.peers.names import Peer
from kvpolicy.evaluate.tasks.case import TaskSizes
from kvpolicy.evaluate.tasks.generated import Generated
from kvpolicy.evaluate.tasks.names import task_of
from kvpolicy.evaluate.testbed.tasks.item import SHORTEST
from kvpolicy.evaluate.testbed.vocabulary import MAXIMUM_LENGTH
from kvpolicy.plan.plan import READ_ALL
from kvpolicy.policy import Policy

FULL = "full cache"
OTHER_PRECISION = "full cache, other precision"


@attrs.frozen
class Contender:
    """One line of the result: the full cache, or a policy or a peer with its share of the full cache's bytes.

    Policies that keep and read everything have no share: they hold what their store takes. Policies that keep
    everything and read less of it read the share.
    """

    policy: Policy | None = None
    share: Fraction | None = None
    other_precision: bool = False  # of the full cache: float32 if the model's is narrower, else bfloat16
    peer: Peer | None = None  # a cache of another library, in place of a policy

    @property
    def name(self) -> str:
        """The name of the policy or peer, without its budget."""
        if self.peer is not None:
            return self.peer.label
        if self.policy is None:
            return OTHER_PRECISION if self.other_precision else FULL
        return self.policy.name

    @property
    def key(self) -> tuple[str, float | None]:
        """What its cells are told apart by from those of other contenders."""
        return self.name, None if self.share is None else float(self.share)

    @property
    def label(self) -> str:
        """`"rkv 10%"`."""
        return self.name if self.share is None else f"{self.name} {percent(self.share)}"


@attrs.frozen
class EvaluationSetup:
    """Which policies, at which shares, on which cases."""

    policies: tuple[Policy, ...]
    tasks: tuple[str, ...]
    shares: tuple[Fraction, ...] = (Fraction(1, 4), Fraction(1, 8), Fraction(1, 16))
    sizes: TaskSizes = attrs.field(factory=TaskSizes)
    step: int = 32  # tokens of a continuation that are computed at once
    precision: bool = True  # whether the full cache in another precision is measured, as a floor of the noise
    peers: tuple[Peer, ...] = ()  # caches of other libraries, measured in a process of their own
    times: bool = False  # whether prefill and decode steps are timed, on the first group; beside peers on all groups
    prompts_in_float32: bool = False  # whether prompts, then rounded, and calibrations are computed in it

    def __attrs_post_init__(self) -> None:
        for name in ("documents", "length", "scored", "questions"):
            if getattr(self.sizes, name) < 1:
                raise EvaluationError(f"{name} must be at least 1: {getattr(self.sizes, name)}")
        if self.sizes.seed < 0:
            raise EvaluationError(f"seed must be at least 0: {self.sizes.seed}")
        if self.sizes.scored < 2:
            raise EvaluationError(f"scored must be at least 2: {self.sizes.scored}")
        for share in self.shares:
            if not 0 < share < 1:
                raise EvaluationError(f"a share must be above 0% and below 100%: {percent(share)}")
        if len(set(self.shares)) < len(self.shares):
            raise EvaluationError(f"shares must be different: {', '.join(map(percent, self.shares))}")
        embedded = any(isinstance(task_of(name), Generated) for name in self.tasks)
        if embedded and not SHORTEST <= self.sizes.length <= MAXIMUM_LENGTH:
            raise EvaluationError(f"length must be from {SHORTEST} to {MAXIMUM_LENGTH}: {self.sizes.length}")
        names = [policy.name for policy in self.policies]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise EvaluationError(f"policies must have different names: {', '.join(twice)}")

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """The full cache, then what keeps and reads everything, then the others at every share; peers after ours."""
        policies = [policy for policy in self.policies if policy.name != "full"]
        whole = [Contender(policy) for policy in policies if _needs_no_share(policy)]
        others = [policy for policy in policies if not _needs_no_share(policy)]
        whole += [Contender(peer=peer) for peer in self.peers if not peer.shared]
        shared = [peer for peer in self.peers if peer.shared]
        found = [Contender(), *whole]
        for share in self.shares:
            found += [Contender(policy, share) for policy in others]
            found += [Contender(share=share, peer=peer) for peer in shared]
        return tuple(found)


def _needs_no_share(policy: Policy) -> bool:
    return keeps_everything(policy.spec) and policy.spec.read.name == READ_ALL


def percent(share: Fraction | float) -> str:
    """`"12.5%"`."""
    return f"{float(share * 100):.4g}%"
