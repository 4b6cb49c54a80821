"""Properties of a plugin that the conformance suite cannot find out."""

import attrs


@attrs.frozen
class Promises:
    """Declared by the author of a plugin: which checks apply to it."""

    heads_apart: bool = True  # scorer: scores of a KV head depend on that head alone
    gathers: bool = False  # merger: kept entries are moved bit for bit
    error: float = 0.0  # codec: largest round-trip error, relative to the largest magnitude
