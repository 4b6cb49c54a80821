"""The shipped policies, and how to make them small enough that a short prompt is compressed."""

import kvpolicy

NAMES = (
    *("adakv", "ams", "blend", "chunkkv", "criticaladakv", "criticalkv", "gkv", "h2o", "keydiff", "kvcrush"),
    *("pyramidkv", "rkv", "snapkv", "streaming_llm", "tova", "vase"),
)
RAGGED = ("adakv", "blend", "criticaladakv")
EVEN = tuple(name for name in NAMES if name not in RAGGED)


def small(name, budget=12, every=4, **overrides):
    """A shipped policy with a budget below the prompts of the tests."""
    protect = overrides.pop("protect", {"sinks": 2, "recent": 4})
    compress = {"every": every, **overrides.pop("compress", {})}
    return kvpolicy.load(name, budget=budget, protect=protect, compress=compress, **overrides)


def held(cache):
    """Positions that each managed layer holds: [layer][row][head] of ascending lists, empty slots left out."""
    return [[[_held(layer, row, head) for head in _heads(layer)] for row in _rows(layer)] for layer in cache.managed]


def _held(layer, row, head):
    slots = layer.storage.positions(row, head).tolist()
    real = [position for position in slots if position >= 0]
    assert real == sorted(real) or not layer.in_order
    return sorted(slots)


def _rows(layer):
    return range(layer.storage.rows)


def _heads(layer):
    return range(layer.storage.heads)
