"""The testbed's words: plain English, one token a word, so that every prompt and answer can be read."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int64]

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
MAXIMUM_LENGTH: Final = 2048


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MARKERS: Final = _words(". the a note ask set link value sum total check begin start report end recite list turn")
DIGITS: Final = _words("0 1 2 3 4 5 6 7 8 9")
TOTALS: Final = _words("zero one two three four five six seven eight nine")
VALUES: Final = _words("amber black blue bronze crimson gold green ivory jade orange pink purple red silver teal white")
NAMES: Final = _words("""
    anchor apple badger banjo basil beacon birch bridge candle canoe castle cedar cherry clover comet copper
    dolphin dragon eagle ember falcon fern flint forest garnet ginger hammer harbor hazel heron island ivy
    jaguar juniper kettle lantern lemon lotus maple marble meadow mirror nettle oak olive orchid otter panther
    pebble pepper piano quartz raven ribbon river saddle salmon spruce thistle tiger tulip valley violin willow
""")
QUALITIES: Final = _words("""
    ancient bitter brave bright broad busy calm careful cheerful clever cold cosy curious damp dark deep dry
    eager faint famous fresh gentle happy heavy hidden hollow humble idle kind large lazy light little lonely
    loud lucky mild modern narrow noisy odd old patient plain polite proud quiet rapid rare shy simple sleepy
    slow small smooth soft steep tall tiny warm weary wide wild young
""")
SUBJECTS: Final = _words("""
    artist author baker barber brother captain carpenter child clerk cook crowd dancer doctor driver
    farmer father fisher friend gardener grandmother guard guest hunter judge king lawyer mayor merchant miller
    mother musician neighbour nurse officer painter pilot player poet porter prince queen ranger rider sailor
    scholar singer sister soldier stranger student tailor teacher traveller uncle village visitor waiter walker
    weaver widow winner worker writer
""")
VERBS: Final = _words("""
    argues arrives awakes bends breathes climbs counts dances dreams drifts eats falls fishes follows
    grows hesitates hides hurries jokes jumps knocks laughs leaves lingers listens looks marches moves nods
    paints pauses plays ponders prays reads remembers replies rests returns rides rises runs shouts sighs sings
    sits sleeps smiles speaks stands stays swims talks thinks travels trembles waits walks wanders watches waves
    whispers works yawns
""")
MANNERS: Final = _words("""
    again ahead alone already aloud always apart away badly below daily early far fast forever gladly
    here home indoors inside late later lightly nearby neatly never nightly now often once outside
    quickly rarely sadly seldom softly soon still then there today together tomorrow tonight twice upstairs
    usually weekly well yesterday
""")
VOCABULARY: Final = (
    PAD, BOS, EOS, *MARKERS, *DIGITS, *TOTALS, *VALUES, *NAMES, *QUALITIES, *SUBJECTS, *VERBS, *MANNERS,
)  # fmt: skip
IDS: Final = {word: index for index, word in enumerate(VOCABULARY)}


def ids_of(words: tuple[str, ...]) -> TokenIds:
    """Return the token ids of ``words``, shape [len(words)]."""
    return np.array([IDS[word] for word in words], dtype=np.int64)


def text_of(ids: TokenIds) -> str:
    """Return the text of ``ids`` [T], words separated by one space."""
    return " ".join(VOCABULARY[index] for index in ids)
