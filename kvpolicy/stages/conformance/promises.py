"""What a plugin claims beyond its contract, or may not be held to."""

import attrs


@attrs.frozen
class Promises:
    """Told by the author of a plugin, because no check can find it out."""

    heads_apart: bool = True  # a scorer scores each KV head from that head alone
    gathers: bool = False  # a merger moves the kept entries bit for bit
    error: float = 0.0  # a codec's largest error of a round trip, relative to the largest magnitude
