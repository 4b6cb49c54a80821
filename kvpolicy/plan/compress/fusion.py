"""What of a policy runs in fused kernels, and why the rest does not."""

from typing import Any

import attrs

from kvpolicy.errors import described, one_line, shown
from kvpolicy.spec.policy import PolicySpec, Weighted
from kvpolicy.stages import Allocator, JointAllocator, Scorer
from kvpolicy.stages.checking.declared import flag_of
from kvpolicy_kernels import Postprocess, Tile


@attrs.frozen(eq=False)
class Term:
    """One term of the score: the tile function that the score kernel calls, or why it has none."""

    weighted: Weighted
    tile: Tile | None
    reason: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without its Triton functions, which the scorer is asked for again."""
        return _again, (self.weighted, self.tile is not None, self.reason)

    @property
    def postprocess(self) -> Postprocess:
        """What follows the tile function; the scores of a reference are finished but for scale and weight."""
        own = self.tile.postprocess if self.tile is not None else Postprocess()
        return attrs.evolve(own, normalise=self.weighted.normalise, weight=self.weighted.weight)


@attrs.frozen(eq=False)
class Fusion:
    """The parts of a policy that kernels can do. A reason is empty where nothing stands against it."""

    terms: tuple[Term, ...]
    allocate: str
    select: str
    merge: str
    absent: str  # against all kernels: there is no GPU
    off: str  # against those that compress: the same, or a first trial failed


def fusion_of(spec: PolicySpec, off: str) -> Fusion:
    """What the plugins of a policy offer to a plan that fuses; `off` says why nothing is."""
    return Fusion(
        absent=off,
        off=off,
        terms=tuple(Term(weighted, None, off) if off else _term(weighted) for weighted in spec.score),
        allocate=_against_counting(spec.allocate.divider),
        select="" if spec.select.best else "keeps other entries than the highest scores",
        merge="" if spec.merge.moves_only else "changes the entries that it keeps",
    )


def _term(weighted: Weighted) -> Term:
    offered = _offered(weighted.scorer)
    return Term(weighted, None, offered) if isinstance(offered, str) else Term(weighted, offered)


def _again(weighted: Weighted, tiled: bool, reason: str) -> Term:
    return _term(weighted) if tiled else Term(weighted, None, reason)


def _offered(scorer: Scorer) -> Tile | str:
    try:
        offered: object = scorer.tile()
    except ModuleNotFoundError as error:  # most tile functions are imported where they are asked for
        return "Triton is not installed" if error.name == "triton" else f"its tile function needs {error.name}"
    except Exception as error:  # noqa: BLE001 - a third party's code: its reference runs instead, and the plan says why
        return f"its tile function failed: {described(error)}"
    if isinstance(offered, str):
        return one_line(offered) or "gives no reason"
    return offered if isinstance(offered, Tile) else f"its tile function is none: {shown(offered)}"


def _against_counting(allocator: Allocator) -> str:
    """Why counts do not follow from how many of the best entries each head owns, which a kernel can tell."""
    if isinstance(allocator, JointAllocator):
        return "ranks the entries of all layers"
    return "reads single scores" if flag_of(allocator, "reads_scores") else ""
