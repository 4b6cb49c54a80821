"""How a scorer's score is computed on a GPU: a tile function, and what happens to its numbers afterwards."""

from collections.abc import Callable, Sequence
from typing import Any

import attrs
from torch import Tensor

from kvpolicy_kernels.common.segments import Column, Segments
from kvpolicy_kernels.common.traffic import Traffic


@attrs.frozen
class WindowUse:
    """How the logits of the observation window become the probabilities that a tile function is given.

    1. logits = scaling · q·k + log-votes of the last `queries` queries, [G, W, T];
    2. `group` reduces them over the query heads of a KV head, or does not; reduced, G is 1;
    3. softmax over the entries of `region` that are not later than the query, if `causal`. An entry outside, and every
       entry for a query that does not exist or sees nothing, has probability 0.
    """

    queries: int
    region: str = "all"  # or "candidates"
    causal: bool = True
    group: str = "none"  # or "max", "mean", "sum"


@attrs.frozen
class Finish:
    """What follows a tile function, in this order; needs all entries of a head at once.

    `pool` is a window of odd `size` over neighbouring candidates: `max` sees -inf and `average` sees zeros, which its
    divisor counts, where there is no candidate. `softmax` is over the held entries of a head (0 elsewhere), `shared`
    the mean over the KV heads of a row. `normalise`: `max` divides by the largest finite magnitude among candidates,
    `standard` subtracts their mean and divides by their standard deviation. `weight` comes last.
    """

    softmax: bool = False
    pool: str = "none"  # or "max", "average"
    size: int = 1
    shared: bool = False
    normalise: str = "none"  # or "max", "standard"
    weight: float = 1.0


@attrs.frozen(eq=False)
class ColumnRequest:
    """What a scorer's own kernel may read: all segments of the layers that are compressed together."""

    segments: Segments
    keys: Column
    values: Column
    positions: Column


@attrs.frozen
class Tile:
    """A scorer as the score kernel sees it.

    `function` is a `@triton.jit` function of tiles of BLOCK entries, float32 in and out, without loads, stores or
    program ids, whose module imports `triton.language as tl`; it returns [BLOCK] scores (anything, for slots that hold
    nothing). What it does not use is given as None:

        function(keys,           # [BLOCK, D], zeros behind the head dim and in slots that hold nothing, if `keys`
                 values,         # [BLOCK, Dv] likewise, if `values`
                 positions,      # [BLOCK] int32
                 newest,         # int32 scalar, if `newest`: the largest position that any head of the row holds
                 probabilities,  # [BLOCK, G, W], if `window`; G and W rounded up to powers of two, zeros there
                 voters,         # float32 scalar, if `window`: how many of the last W queries exist; they come last
                 group,          # float32 scalar: query heads per KV head, or 1 if `window.group` reduced them; if
                                 # `window` or `attention`
                 attention,      # [BLOCK, G], if `attention`: mass received, G rounded up, zeros there
                 statistic,      # [D], if `statistic`: its sum over the held entries
                 column,         # [BLOCK], if `column`
                 length,         # float32 scalar: entries that the head holds
                 arguments,      # tuple of float32 scalars
                 OPTIONS: tl.constexpr)  # tuple of ints

    `statistic` is a `@triton.jit` function from keys [BLOCK, D] to [BLOCK, D], summed over all held entries of a head
    before any score is computed. `column` is called on the host before the score kernel, with the tensors of
    `ColumnRequest`, and returns [P, T] float32: for what needs a kernel of its own. `column_traffic` says the most
    bytes that it moves for heads that hold so many entries each, for `kvpolicy plan`; tensors are on the meta device.
    """

    function: Any
    options: tuple[int, ...] = ()
    arguments: tuple[float, ...] = ()
    window: WindowUse | None = None
    keys: bool = True
    values: bool = False
    newest: bool = False
    attention: bool = False
    statistic: Any = None
    column: Callable[[ColumnRequest], Tensor] | None = None
    column_traffic: Callable[[ColumnRequest, Sequence[int]], Traffic] | None = None
    finish: Finish = Finish()
