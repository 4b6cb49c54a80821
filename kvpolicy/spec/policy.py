"""A policy as data: what a YAML file says, checked and with every default filled in."""

from typing import Any

import attrs

from kvpolicy.errors import ParameterError
from kvpolicy.spec.budget import Budget, Part
from kvpolicy.spec.writable import check_writable
from kvpolicy.stages.contracts import (
    Allocator,
    Codec,
    HeadAllocator,
    JointAllocator,
    LayerAllocator,
    Merger,
    Reader,
    Scorer,
    Selector,
)
from kvpolicy.stages.parameters import (
    LARGEST,
    Choice,
    Flag,
    Integer,
    Nested,
    Number,
    Plugged,
    Rule,
    Text,
    parameter,
)

SCHEMA_VERSION = 1
NEVER = "never"
MOST_SCORERS = 64  # far more than any method sums, and few enough to be written out
_EVERY = Integer(minimum=1)
_COUNT = Integer(minimum=0)
_NAME = Text(longest=64)


@attrs.frozen
class BudgetRule(Rule):
    """The budget of a policy."""

    def accepts(self, value: object) -> bool:
        return isinstance(value, Budget) and Budget.parse(value.dump()) == value

    def convert(self, value: Any) -> Any:
        return Budget.parse(value) or value

    def schema(self) -> dict[str, Any]:
        text = {"type": "string", "pattern": r"^\d+(\.\d+)? ?(%|B|[KMG]i?B)$"}
        return {"anyOf": [{"type": "integer", "minimum": 1, "maximum": LARGEST}, text]}

    def __str__(self) -> str:
        return (
            f'a number of tokens from 1 to {LARGEST}, a share such as "10%", or a size such as "2GiB", up to 2^60 bytes'
        )


@attrs.frozen
class EveryRule(Rule):
    """How many new tokens may come on top of the budget."""

    def accepts(self, value: object) -> bool:
        return value == NEVER or _EVERY.accepts(value)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [_EVERY.schema(), {"const": NEVER}]}

    def __str__(self) -> str:
        return f"{_EVERY}, or {NEVER}"


@attrs.frozen
class CountRule(Rule):
    """How many entries: a number, or a part of the budget."""

    def accepts(self, value: object) -> bool:
        if isinstance(value, Part):
            return Part.parse(value.dump()) == value
        return _COUNT.accepts(value)

    def convert(self, value: Any) -> Any:
        return Part.parse(value) or value

    def schema(self) -> dict[str, Any]:
        text = {"type": "string", "pattern": r"^\d+(\.\d+)? ?%$"}
        return {"anyOf": [_COUNT.schema(), text]}

    def __str__(self) -> str:
        return f'{_COUNT}, or a share of the budget such as "50%"'


@attrs.frozen
class NamesRule(Rule):
    """Names, each of them once."""

    most: int = 64

    def accepts(self, value: object) -> bool:
        if not isinstance(value, tuple) or len(value) > self.most or len(set(map(str, value))) < len(value):
            return False
        return all(_NAME.accepts(name) and name for name in value)

    def convert(self, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def schema(self) -> dict[str, Any]:
        items = {**_NAME.schema(), "minLength": 1}
        return {"type": "array", "maxItems": self.most, "uniqueItems": True, "items": items}

    def __str__(self) -> str:
        return f"a list of at most {self.most} names, each of them once"


@attrs.frozen
class ScoreRule(Rule):
    """The weighted list of scorers."""

    def accepts(self, value: object) -> bool:
        if not isinstance(value, tuple) or not 1 <= len(value) <= MOST_SCORERS:
            return False
        return all(isinstance(one, Weighted) for one in value)

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "minItems": 1, "maxItems": MOST_SCORERS, "items": {"$ref": "#/$defs/weighted"}}

    def __str__(self) -> str:
        return f"a list of 1 to {MOST_SCORERS} scorers"


@attrs.frozen
class Weighted:
    """One term of the score: the keys that stand beside `use` and the scorer's own parameters."""

    scorer: Scorer = parameter(Plugged("score"), help="the scorer")
    weight: float = parameter(Number(), 1.0, help="factor in the sum; negative = evict what scores high")
    normalise: str = parameter(
        Choice(("none", "max", "standard")),
        "none",
        help="before weighting, over a head's candidates: divide by the largest magnitude, or to mean 0, deviation 1",
    )


BESIDE = tuple(field.name for field in attrs.fields(Weighted) if field.name != "scorer")


@attrs.frozen
class Compress:
    """When a layer is compressed."""

    prefill: bool = parameter(Flag(), True, help="after a prompt, a prompt chunk or another turn")
    every: int | str = parameter(
        EveryRule(), 128, help="while decoding, each time this many tokens have come on top of the budget"
    )


@attrs.frozen
class Protect:
    """Entries that are never evicted."""

    sinks: int | Part = parameter(CountRule(), 0, help="first tokens of the sequence, pads not counted")
    recent: int | Part = parameter(
        CountRule(), 0, help='last tokens of the sequence; "100%" = all that the sinks leave'
    )

    prompt: bool = parameter(Flag(), False, help="all of the first prompt")
    regions: tuple[str, ...] = parameter(
        NamesRule(), (), help="spans of the request with these names, which are given with the cache"
    )

    @property
    def by_place(self) -> bool:
        """Whether spans of a request are protected, beside its first and last tokens."""
        return self.prompt or bool(self.regions)

    @property
    def total(self) -> int:
        """Entries that are protected whatever the budget: shares of it are not counted."""
        return sum(one for one in (self.sinks, self.recent) if isinstance(one, int))

    @property
    def scales(self) -> bool:
        """Whether what is protected depends on the budget."""
        return isinstance(self.sinks, Part) or isinstance(self.recent, Part)

    def of(self, budget: int) -> tuple[int, int]:
        """Sinks and recent entries under a budget of so many entries.

        Shares are rounded down, and never take more than the budget leaves: a share of recent entries beside the
        sinks, a share of sinks beside a number of recent entries.
        """
        sinks = self.sinks.of(budget) if isinstance(self.sinks, Part) else self.sinks
        recent = self.recent.of(budget) if isinstance(self.recent, Part) else self.recent
        if isinstance(self.recent, Part):
            recent = max(0, min(recent, budget - sinks))
        elif isinstance(self.sinks, Part):
            sinks = max(0, min(sinks, budget - recent))
        return sinks, recent


@attrs.frozen
class Allocate:
    """How the budget is divided."""

    layers: LayerAllocator = parameter(Plugged("allocate.layers", default="uniform"), help="over layers")
    heads: HeadAllocator = parameter(Plugged("allocate.heads", default="uniform"), help="over the KV heads of a layer")
    joint: JointAllocator | None = parameter(
        Plugged("allocate.joint", optional=True), None, help="over all layers and heads at once, in place of these two"
    )

    def __attrs_post_init__(self) -> None:
        if self.joint is not None and (self.layers.name, self.heads.name) != ("uniform", "uniform"):
            raise ParameterError("joint divides over layers and heads: leave layers and heads out")

    @property
    def divider(self) -> Allocator:
        """What is asked when entries have been scored."""
        return self.heads if self.joint is None else self.joint


@attrs.frozen
class PolicySpec:
    """The whole recipe. Immutable and without run state: one may serve many models and threads at once."""

    name: str = parameter(Text(), help="a word to know the policy by")
    budget: Budget = parameter(BudgetRule(), help="entries kept per KV head, averaged over layers and heads")
    score: tuple[Weighted, ...] = parameter(ScoreRule(), help="weighted sum of scorers; larger = keep")
    allocate: Allocate = parameter(Nested(Allocate), help="how the budget is divided")
    select: Selector = parameter(Plugged("select", default="topk"), help="which candidates stay")
    merge: Merger = parameter(Plugged("merge", default="drop"), help="what becomes of evicted entries")
    store: Codec = parameter(Plugged("store", default="plain"), help="how kept entries are held")
    read: Reader = parameter(Plugged("read", default="all"), help="which held entries a decode step attends to")
    compress: Compress = parameter(Nested(Compress), Compress(), help="when to compress")
    protect: Protect = parameter(Nested(Protect), Protect(), help="what is never evicted")
    summary: str = parameter(Text(), "", help="one line for people")
    reference: str = parameter(Text(), "", help="where the method was published")

    def __attrs_post_init__(self) -> None:
        check_writable(self)
