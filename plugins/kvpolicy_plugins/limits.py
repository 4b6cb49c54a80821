"""Bounds of parameters whose cost grows with the number that a policy file gives."""

from kvpolicy.stages import Integer

MOST_QUERIES = 4096  # each costs a product with every key, and is held: more than any published method observes
MOST_CHANNELS = 4096  # of a group; a head dimension that large is not known
WIDEST_POOL = 1023  # every entry is compared with so many neighbours
MOST_SEED = 2**32 - 1

QUERIES = Integer(minimum=1, maximum=MOST_QUERIES)
QUERIES_OR_ALL = Integer(minimum=0, maximum=MOST_QUERIES)
SEED = Integer(minimum=0, maximum=MOST_SEED)
