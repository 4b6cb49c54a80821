"""What the methods cost in plain torch, written from the papers the way their published codes go about it.

These are baselines: keys repeated per query head, matrices of T x T, gathers with expanded indices.
"""

from kvpolicy.bench.naive.held import Entries, Held
from kvpolicy.bench.naive.known import NaiveForm, naive_of

__all__ = ["Entries", "Held", "NaiveForm", "naive_of"]
