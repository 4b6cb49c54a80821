"""What the methods cost in plain torch, written from the papers the way their published codes go about it.

These are baselines: keys repeated per query head, matrices of T x T, gathers with expanded indices.
"""

from kvpolicy.bench.baselines.naive.forms import NaiveForm, naive_of
from kvpolicy.bench.baselines.naive.layer_tensors import Entries, LayerTensors

__all__ = ["Entries", "LayerTensors", "NaiveForm", "naive_of"]
