"""Everything that a GPU can show, within minutes: compression, attention, decoding, generation, and correctness.

The time is shared out over the parts; what does not fit is left out by name, and results are written as they come.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import attrs
import torch
from transformers import LlamaForCausalLM

from kvpolicy.bench import generation
from kvpolicy.bench.baselines.contenders import COMPILED, DYNAMIC, STATIC
from kvpolicy.bench.cases import attention, compress, decode
from kvpolicy.bench.cases.compress import NAIVE
from kvpolicy.bench.generation.memory import tidy
from kvpolicy.bench.protocol.case import OURS, Case
from kvpolicy.bench.protocol.clock import Clock
from kvpolicy.bench.protocol.correctness import kernel_tests
from kvpolicy.bench.protocol.deadline import Deadline
from kvpolicy.bench.protocol.interleave import Repetitions
from kvpolicy.bench.protocol.left_out import NO_TIME
from kvpolicy.bench.protocol.model_shapes import model_shape, random_model
from kvpolicy.bench.protocol.result import Result
from kvpolicy.bench.report.verdict import Verdict
from kvpolicy.bench.sizes import DECODED, Sizes
from kvpolicy.errors import KVPolicyError
from kvpolicy.policy import Policy, load
from kvpolicy.spec.budget import Budget

SECONDS = 480.0
_LEAST = 48  # entries that a policy keeps in generation; a tenth of the tokens, where that is more
COMPRESSED = ("snapkv", "rkv", "adakv")
_ATTENDED_LAYERS = 8  # hold several times what caches of the device do
ATTENDED = ("snapkv", "adakv", "rkv_int4")  # as many entries in every head; ragged heads; packed entries
# Of what remains when a part begins. The tests of the kernels come first: wrong kernels need no timing.
_SHARES = {"correctness": 0.2, "attention": 0.15, "compress": 0.3, "decode": 0.45, "generate": 0.95}
PARTS = tuple(_SHARES)
_RESERVE = 30.0  # seconds for writing and for the part that is late


@attrs.frozen
class GpuSetup:
    """The parts, as they would be measured alone."""

    compress: compress.CompressSetup
    attention: attention.AttentionSetup
    decode: decode.DecodeSetup
    generate: generation.GenerateSetup
    tests: Callable[[float], dict[str, Any]] = kernel_tests

    @property
    def steps(self) -> int:
        """How much `measure` yields, at most."""
        contenders = len(self.generate.policies) + len(self.generate.full) + 1
        compressed = len(self.compress.policies) * len(self.compress.lengths)
        attended = len(self.attention.policies) * len(self.attention.entries)
        return 1 + compressed + attended + len(self.decode.lengths) + contenders


def setup_for(sizes: Sizes, budget: int, device: torch.device, dtype: torch.dtype, *, graph: bool) -> GpuSetup:
    """All parts at these sizes; attention heads are those of the 8B model unless the sizes are tiny."""
    shape = attrs.evolve(model_shape(sizes.model), layers=sizes.layers)
    policies = tuple(load(f"kvpolicy:{name}", budget=budget) for name in COMPRESSED)
    attended = tuple(_attended(name, budget, shape.head_dim) for name in ATTENDED)
    decoded = tuple(load(f"kvpolicy:{name}", budget=budget, **sizes.overrides) for name in DECODED)
    tenth = tuple(load(f"kvpolicy:{name}", budget=max(_LEAST, sizes.new // 10), **sizes.overrides) for name in DECODED)
    memory = Budget.parse(sizes.memory)
    protocol = Repetitions(sizes.rounds, warm_up=2)
    common: dict[str, Any] = {"device": device, "dtype": dtype}
    return GpuSetup(
        compress.CompressSetup(policies, shape, sizes.lengths, protocol=protocol, **common),
        attention.AttentionSetup(
            attended,
            attrs.evolve(shape, layers=min(shape.layers, _ATTENDED_LAYERS)),
            sizes.attended,
            sizes.attention_rows,
            protocol=protocol,
            **common,
        ),
        decode.DecodeSetup(
            decoded,
            model_shape(sizes.model),
            sizes.contexts,
            full=sizes.full,
            graph=graph,
            protocol=protocol,
            **common,
        ),
        generation.GenerateSetup(
            tenth,
            model_shape(sizes.model),
            sizes.prompt,
            sizes.new,
            (memory and memory.size) or 1,
            full=(DYNAMIC, COMPILED if COMPILED in sizes.full else STATIC),
            graph=graph,
            points=sizes.points,
            **common,
        ),
    )


def measure(
    setup: GpuSetup, clock: Clock, deadline: Deadline, result: Result, only: Collection[str] = PARTS
) -> Iterator[str]:
    """Run the parts into `result`; yields what was done last."""
    parts: dict[str, Callable[[Deadline], Iterator[tuple[str, list[Case]]]]] = {
        "correctness": partial(_correctness, setup, result),
        "attention": lambda until: attention.measure(setup.attention, clock, until, result.leave_out),
        "compress": lambda until: compress.measure(setup.compress, clock, until, result.leave_out),
        "decode": lambda until: decode.measure(
            setup.decode, _model(setup.decode, max(setup.decode.lengths)), clock, until, result.leave_out
        ),
        "generate": lambda until: generation.measure(
            setup.generate, _model(setup.generate, setup.generate.length), clock, until, result.leave_out
        ),
    }
    until = Deadline(deadline.at if deadline.at is None else deadline.at - _RESERVE, deadline.now)
    for name in PARTS:
        if name not in only:
            continue
        if until.expired():
            result.leave_out(name, NO_TIME)
            continue
        try:
            yield from result.collect(name, parts[name](until.share(_SHARES[name])))
        except (KVPolicyError, RuntimeError) as error:  # one part that fails must not cost what the others measured
            result.leave_out(name, f"{type(error).__name__}: {str(error).splitlines()[0]}")
            yield f"{name} failed"
    result.note("goals", [verdict.to_dict() for verdict in goals(result)])


def goals(result: Result) -> Iterator[Verdict]:
    """What is claimed of an H200, as far as this result tells."""
    for case in result.parts.get("compress", ()):
        share = case.of_floor()
        if case.what == "snapkv" and case.length >= 8192 and share is not None:
            yield Verdict("floor", f"SnapKV compression of {case.length} entries: share of the floor", share, 0.6)
        if case.what == "rkv" and case.length == 4096 and NAIVE in case.samples:
            yield Verdict("rkv", "R-KV, 4096 entries: times faster than with all pairs", case.ratio(NAIVE), 20.0)
    for case in result.parts.get("attention", ()):
        share = case.of_floor()
        if share is not None and case.length >= 8192:  # fewer are read within the time of two launches
            claim = f"attention over {case.length} entries of {case.what}: share of the copy's rate"
            yield Verdict("attention", claim, share, 0.8)
    for case in result.parts.get("generate", ()):
        yield from _generation_goals(case)


def _generation_goals(case: Case) -> Iterator[Verdict]:
    """Never the weak baseline without the strong one."""
    searched = case.facts.get("largest", {})
    if {OURS, DYNAMIC, COMPILED} <= set(case.samples) and all(searched.values()):
        for name, least in ((DYNAMIC, 6.6), (COMPILED, 5.0)):
            claim = f"{case.what}, {case.length} tokens: times the tokens/s of {name}, each at its largest batch"
            yield Verdict("generate", claim, case.ratio(name), least)


def _attended(name: str, budget: int, head_dim: int) -> Policy:
    """A shipped policy, quantised in groups that fit into tiny heads."""
    policy = load(f"kvpolicy:{name}", budget=budget)
    group = getattr(policy.spec.store, "group", head_dim)
    if group <= head_dim:
        return policy
    return load(f"kvpolicy:{name}", budget=budget, store={"use": "kivi", "group": head_dim})


def _correctness(setup: GpuSetup, result: Result, deadline: Deadline) -> Iterator[tuple[str, list[Case]]]:
    result.note("kernel tests", setup.tests(min(deadline.left, SECONDS)))
    yield "kernel tests", []


def _model(setup: decode.DecodeSetup | generation.GenerateSetup, positions: int) -> LlamaForCausalLM:
    if setup.device.type == "cuda":
        torch.compiler.reset()  # compiled steps keep the memory of their graphs
        tidy(setup.device)
    return random_model(setup.shape, positions, setup.device, setup.dtype)
