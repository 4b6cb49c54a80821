"""Which policies have a naive form."""

import attrs
import torch

from kvpolicy.bench.baselines.naive.layer_tensors import Entries, LayerTensors, Naive
from kvpolicy.bench.baselines.naive.rkv import PAIR_BYTES, rkv
from kvpolicy.bench.baselines.naive.window_votes import adakv, snapkv, tova
from kvpolicy.spec.policy import PolicySpec

_SINKS = 4


@attrs.frozen
class NaiveForm:
    """A method in plain torch and the bytes that it takes for every pair of entries of a row and KV head."""

    run: Naive
    pair_bytes: int = 0


def streaming_llm(layer: LayerTensors, budget: int) -> Entries:
    """StreamingLLM (arXiv:2309.17453, section 3.2): the first entries and the newest, joined anew."""
    first = layer.keys.shape[2] - budget + _SINKS
    keys, values = (torch.cat([ends[:, :, :_SINKS], ends[:, :, first:]], 2) for ends in (layer.keys, layer.values))
    return keys, values


_FORMS = {
    "adakv": NaiveForm(adakv),
    "pyramidkv": NaiveForm(snapkv),
    "rkv": NaiveForm(rkv, PAIR_BYTES),
    "snapkv": NaiveForm(snapkv),
    "streaming_llm": NaiveForm(streaming_llm),
    "tova": NaiveForm(tova),
}


def naive_of(spec: PolicySpec) -> NaiveForm | None:
    """The naive form of a shipped policy, by its name; None for others."""
    return _FORMS.get(spec.name)
