"""What one cache gave on a group of cases, and what it cost."""

from collections.abc import Mapping

import attrs


@attrs.frozen
class Costs:
    """Bytes as shares of a full cache's at the same time; seconds by the clock of the process that measured them."""

    prompt_share: float  # right after the longest prompt
    end_share: float  # in the end
    prefill_seconds: float  # the forward over a prompt of one row, its compression included
    step_seconds: float  # of a decode step behind it, one row, median


@attrs.frozen
class Measured:
    """What one cache gave on the cases of a group. Bytes are of one sequence, in the managed layers."""

    values: dict[str, list[float]]
    seconds: float
    held_bytes: float
    full_bytes: float
    texts: tuple[str, ...] = ()
    costs: Costs | None = None  # where other libraries are measured beside ours
    versions: Mapping[str, str] = attrs.field(factory=dict)  # of another library's environment
