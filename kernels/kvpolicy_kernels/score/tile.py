"""How a scorer takes part in the fused score kernel: its tile function, and the postprocessing of its scores."""

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
    2. `group` reduces them over the query heads of a KV head ("none": it does not); reduced, G is 1;
    3. softmax over the entries of `region`, only those not later than the query if `causal`. Entries outside have
       probability 0, and so have all entries for a query that does not exist or sees nothing.
    """

    queries: int
    region: str = "all"  # or "candidates"
    causal: bool = True
    group: str = "none"  # or "max", "mean", "sum"


@attrs.frozen
class Postprocess:
    """What is done to the scores of a tile function, in the order of the fields; it needs all entries of a head.

    Attributes:
        softmax: over the held entries of a head; 0 elsewhere.
        pool: "max" or "average" over a window of neighbouring candidates. Slots that are no candidates count as -inf
            for the maximum, and as zeros in both sum and divisor of the average.
        size: odd number of slots in that window.
        shared: replace scores by their mean over the KV heads of a row.
        normalise: "max" divides by the largest finite magnitude among candidates; "standard" subtracts the mean of the
            candidates and divides by their standard deviation.
        weight: factor, applied last.
    """

    softmax: bool = False
    pool: str = "none"  # or "max", "average"
    size: int = 1
    shared: bool = False
    normalise: str = "none"  # or "max", "standard"
    weight: float = 1.0


@attrs.frozen(eq=False)
class ColumnRequest:
    """What a scorer's own kernel may read: the segments of all layers that are compressed in one launch."""

    segments: Segments
    keys: Column
    values: Column
    positions: Column


@attrs.frozen
class Tile:
    """A scorer as the score kernel calls it.

    `function` is a `@triton.jit` function of tiles of BLOCK entries, float32 in and out, without loads, stores or
    program ids, whose module imports `triton.language as tl`; it returns [BLOCK] scores (any value for empty slots).
    Arguments that it does not ask for are None:

        function(keys,           # [BLOCK, D], zeros beyond the head dim and in empty slots, if `keys`
                 values,         # [BLOCK, Dv] likewise, if `values`
                 positions,      # [BLOCK] int32
                 newest,         # int32 scalar, if `newest`: the largest position of the row's entries
                 probabilities,  # [BLOCK, G, W], if `window`; G and W rounded up to powers of two, zeros in the padding
                 voters,         # float32 scalar, if `window`: how many of the last W queries exist; they come last
                 group,          # float32 scalar, if `window` or `attention`: query heads per KV head, or 1 if
                                 # `window.group` reduced them
                 attention,      # [BLOCK, G], if `attention`: attention mass, G rounded up, zeros in the padding
                 statistic,      # [D], if `statistic`: its sum over the entries of the head
                 column,         # [BLOCK], if `column`
                 length,         # float32 scalar: number of entries of the head
                 arguments,      # tuple of float32 scalars
                 OPTIONS: tl.constexpr)  # tuple of ints

    `statistic` is a `@triton.jit` function from keys [BLOCK, D] to [BLOCK, D], summed over all entries of a head before
    any score is computed. `column` is called on the host before the score kernel and returns [P, T] float32: for
    terms that need a kernel of their own. `column_traffic(request, lengths)` gives an upper bound of the bytes that
    `column` moves for heads of these lengths, for `kvpolicy plan`; the request's tensors are on the meta device.
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
    postprocess: Postprocess = Postprocess()
