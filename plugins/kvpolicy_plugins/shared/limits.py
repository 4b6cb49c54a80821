"""Upper bounds of parameters whose cost grows with their value."""

from kvpolicy.stages import Integer

MOST_QUERIES = 4096  # each is stored and multiplied by every key; more than any published method uses
MOST_CHANNELS = 4096  # per group; larger than any known head dimension
MOST_RANK = 512  # columns of a sketch; more than any known head has dimensions
WIDEST_POOL = 1023  # neighbours of each entry
MOST_PATCHES = 256  # along a side of a frame
MOST_SEED = 2**32 - 1

QUERIES = Integer(minimum=1, maximum=MOST_QUERIES)
QUERIES_OR_ALL = Integer(minimum=0, maximum=MOST_QUERIES)
SEED = Integer(minimum=0, maximum=MOST_SEED)
