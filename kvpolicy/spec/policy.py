"""A policy as data: the content of a YAML file, checked and with all defaults."""

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
    Plugin,
    Reader,
    Scorer,
    Selector,
    ViewPlugin,
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
MAX_SCORERS = 64  # far more than any method uses, and few enough for a policy file
_EVERY = Integer(minimum=1)
_COUNT = Integer(minimum=0)
_NAME = Text(longest=64, shortest=1)


@attrs.frozen
class BudgetRule(Rule):
    """The budget of a policy."""

    def accepts(self, value: object) -> bool:
        return isinstance(value, Budget) and Budget.parse(value.dump()) == value

    def convert(self, value: Any) -> Any:
        return Budget.parse(value) or value

    def schema(self) -> dict[str, Any]:
        text = {"type": "string", "pattern": r"^\d+(\.\d+)? ?(%|% of generated|B|[KMG]i?B)$"}
        return {"anyOf": [{"type": "integer", "minimum": 1, "maximum": LARGEST}, text]}

    def __str__(self) -> str:
        return (
            f'a number of tokens from 1 to {LARGEST}, a share such as "10%" or "25% of generated", or a size such as '
            '"2GiB", up to 2^60 bytes'
        )


@attrs.frozen
class EveryRule(Rule):
    """How many new tokens may be added on top of the budget before the next compression."""

    def accepts(self, value: object) -> bool:
        return value == NEVER or _EVERY.accepts(value)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [_EVERY.schema(), {"const": NEVER}]}

    def __str__(self) -> str:
        return f"{_EVERY}, or {NEVER}"


@attrs.frozen
class CountRule(Rule):
    """A number of entries: an integer, or a share of the budget."""

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
    """A list of distinct names."""

    most: int = 64

    def accepts(self, value: object) -> bool:
        if not isinstance(value, tuple) or len(value) > self.most or len(set(map(str, value))) < len(value):
            return False
        return all(_NAME.accepts(name) for name in value)

    def convert(self, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "maxItems": self.most, "uniqueItems": True, "items": _NAME.schema()}

    def __str__(self) -> str:
        return f"a list of at most {self.most} names, each of them once"


@attrs.frozen
class ScoreRule(Rule):
    """The list of weighted scorers."""

    def accepts(self, value: object) -> bool:
        if not isinstance(value, tuple) or not 1 <= len(value) <= MAX_SCORERS:
            return False
        return all(isinstance(term, Weighted) for term in value)

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "minItems": 1, "maxItems": MAX_SCORERS, "items": {"$ref": "#/$defs/weighted"}}

    def __str__(self) -> str:
        return f"a list of 1 to {MAX_SCORERS} scorers"


@attrs.frozen
class Weighted:
    """One term of the score. In a file its keys are in one mapping with `use` and the scorer's parameters."""

    scorer: Scorer = parameter(Plugged("score"), help="the scorer")
    weight: float = parameter(Number(), 1.0, help="factor in the sum; negative = evict what scores high")
    normalise: str = parameter(
        Choice(("none", "max", "standard")),
        "none",
        help="before weighting, over a head's candidates: divide by the largest magnitude, or to mean 0, deviation 1",
    )


TERM_KEYS = tuple(field.name for field in attrs.fields(Weighted) if field.name != "scorer")


@attrs.frozen
class Compress:
    """When a layer is compressed."""

    prefill: bool = parameter(Flag(), True, help="after a prompt, a prompt chunk or another turn")
    every: int | str = parameter(
        EveryRule(), 128, help="while decoding, each time the budget is exceeded by this many tokens"
    )


@attrs.frozen
class Protect:
    """Entries that are never evicted."""

    sinks: int | Part = parameter(CountRule(), 0, help="first tokens of the sequence, pads not counted")
    recent: int | Part = parameter(CountRule(), 0, help='last tokens of the sequence; "100%" = all but the sinks')

    prompt: bool = parameter(Flag(), False, help="all of the first prompt")
    regions: tuple[str, ...] = parameter(
        NamesRule(), (), help="spans of the request with these names, which are given with the cache"
    )

    @property
    def by_place(self) -> bool:
        """Whether the prompt or regions of the request are protected."""
        return self.prompt or bool(self.regions)

    @property
    def total(self) -> int:
        """Protected entries that do not depend on the budget: shares of the budget are not counted."""
        return sum(count for count in (self.sinks, self.recent) if isinstance(count, int))

    @property
    def scales(self) -> bool:
        """Whether the number of protected entries depends on the budget."""
        return isinstance(self.sinks, Part) or isinstance(self.recent, Part)

    def of(self, budget: int) -> tuple[int, int]:
        """Numbers of sink and recent entries under a budget of `budget` entries.

        Shares are rounded down and limited to what the other number leaves: recent entries to the budget without the
        sinks; sinks, if only they are a share, to the budget without the recent entries.
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
        """The allocator that divides the budget after scoring: the joint one, or the one over heads."""
        return self.heads if self.joint is None else self.joint


@attrs.frozen
class PolicySpec:
    """A complete policy. Immutable and without run state: many models and threads may use one at once."""

    name: str = parameter(Text(), help="a word to know the policy by")
    budget: Budget = parameter(BudgetRule(), help="entries kept per KV head, averaged over layers and heads")
    score: tuple[Weighted, ...] = parameter(ScoreRule(), help="weighted sum of scorers; larger = keep")
    allocate: Allocate = parameter(Nested(Allocate), help="how the budget is divided")
    select: Selector = parameter(Plugged("select", default="topk"), help="which candidates are kept")
    merge: Merger = parameter(Plugged("merge", default="drop"), help="how evicted entries are merged or dropped")
    store: Codec = parameter(Plugged("store", default="plain"), help="how kept entries are stored")
    read: Reader = parameter(Plugged("read", default="all"), help="which entries a decode step attends to")
    compress: Compress = parameter(Nested(Compress), Compress(), help="when to compress")
    protect: Protect = parameter(Nested(Protect), Protect(), help="what is never evicted")
    summary: str = parameter(Text(), "", help="one line for people")
    reference: str = parameter(Text(), "", help="where the method was published")

    def __attrs_post_init__(self) -> None:
        check_writable(self)

    @property
    def shown_views(self) -> dict[str, ViewPlugin]:
        """The plugins that are shown views, by their keys in the file."""
        named: dict[str, ViewPlugin] = {f"score[{term}]": weighted.scorer for term, weighted in enumerate(self.score)}
        divider = self.allocate.divider
        return {**named, divider.stage: divider, "select": self.select, "merge": self.merge}

    @property
    def calibrated(self) -> dict[str, Plugin]:
        """The plugins that must be calibrated on a model, by their keys in the file."""
        named: dict[str, Plugin] = {f"score[{term}]": weighted.scorer for term, weighted in enumerate(self.score)}
        named |= {self.allocate.divider.stage: self.allocate.divider, "store": self.store}
        return {key: plugin for key, plugin in named.items() if plugin.calibrated}
