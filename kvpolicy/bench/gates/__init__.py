"""The CPU gates: ratios within one run, each with the threshold that is claimed or aimed at."""

from collections.abc import Iterator
from functools import partial

import torch

from kvpolicy.bench.gates import compressing, decoding, host, packed, prompts
from kvpolicy.bench.gates.gate import Gate, Judged
from kvpolicy.bench.gates.scale import QUICK, Scale
from kvpolicy.bench.protocol.clock import Clock

__all__ = ["GATES", "QUICK", "Scale", "judge"]

GATES: dict[str, Gate] = {
    "snapkv-bfloat16": partial(compressing.snapkv, torch.bfloat16, 3.0),
    "snapkv-float32": partial(compressing.snapkv, torch.float32, 2.5),
    "rkv": compressing.rkv,
    "compaction": compressing.compaction,
    "decode": decoding.decode,
    "tenth": decoding.tenth,
    "attach": decoding.attach,
    "age": decoding.age,
    "packed": packed.steps,
    "chunk": packed.chunks,
    "prompt": prompts.prompts,
    "thin": host.thin,
    "wide": host.wide,
}


def judge(names: tuple[str, ...], scale: Scale, clock: Clock) -> Iterator[tuple[str, Judged]]:
    """The gates of these names, one after the other."""
    for name in names:
        yield name, GATES[name](scale, clock)
