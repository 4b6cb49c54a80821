"""What is measured unless somebody asks for something else: enough for two cores, and for a large GPU."""

from typing import Any

import attrs
import torch

from kvpolicy.bench.baselines.contenders import COMPILED, DYNAMIC, PREALLOCATED, STATIC

POLICIES = ("snapkv", "rkv", "adakv", "pyramidkv", "gkv", "h2o", "tova", "streaming_llm")
DECODED = ("snapkv", "rkv")


@attrs.frozen
class Sizes:
    """Defaults of one kind of device."""

    dtype: str
    layers: int  # that are compressed together
    lengths: tuple[int, ...]  # of compress
    model: str
    contexts: tuple[int, ...]  # of decode
    prompt: int
    new: int
    memory: str
    points: int
    full: tuple[str, ...]
    attended: tuple[int, ...]  # of attention
    attention_rows: int
    rounds: int
    every: int = 128  # of what decodes

    @property
    def overrides(self) -> dict[str, Any]:
        """Of the policies that decode."""
        return {"compress": {"prefill": True, "every": self.every}}


CPU = Sizes(
    dtype="float32",
    layers=1,
    lengths=(1152, 4096, 8192),
    model="267m",
    contexts=(1024, 4096, 16_384),
    prompt=128,
    new=1024,
    memory="256MiB",
    points=0,
    full=(DYNAMIC, PREALLOCATED, STATIC),
    attended=(1024, 4096),
    attention_rows=1,
    rounds=7,
)
GPU = Sizes(
    dtype="bfloat16",
    layers=32,
    lengths=(1152, 4096, 8192, 32_768),
    model="8b",
    contexts=(8192, 32_768),
    prompt=128,
    new=16_384,
    memory="120GiB",
    points=3,
    full=(DYNAMIC, PREALLOCATED, STATIC, COMPILED),
    attended=(1024, 8192, 32_768),
    attention_rows=8,
    rounds=11,
)
TINY = Sizes(
    dtype="float32",
    layers=2,
    lengths=(128,),
    model="tiny",
    contexts=(160,),
    prompt=16,
    new=80,
    memory="400KiB",
    points=2,
    full=(DYNAMIC, STATIC),
    attended=(64,),
    attention_rows=2,
    rounds=3,
    every=8,
)


def sizes_for(device: torch.device) -> Sizes:
    """The defaults of a device."""
    return GPU if device.type == "cuda" else CPU
