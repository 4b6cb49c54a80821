"""How many examples a property test tries."""

import os

_FACTOR = 20 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 1


def examples(count: int) -> int:
    """`count` in the default run, where every second counts; twenty times as many in the nightly one."""
    return count * _FACTOR
